# What the scripts share: installing missing tools, waiting with a deadline, plain messages.
# Sourced by bash; not run by itself.

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Whether a command exists; administrators' folders count even where the PATH lacks them.
have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

# Runs a command as the administrator.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_be_root() {
    [ "$(id -u)" -eq 0 ] || { have sudo && sudo -n true 2>/dev/null; }
}

# The package of Debian and Ubuntu that brings a command.
package_of() {
    case $1 in
        nbdinfo | nbdcopy) echo libnbd-bin ;;
        nbdfuse) if apt-cache show nbdfuse >/dev/null 2>&1; then echo nbdfuse; else echo libnbd-bin; fi ;;
        nbdsh) echo python3-libnbd ;;
        qemu-img | qemu-io | qemu-nbd) echo qemu-utils ;;
        mkfs.ext4 | e2fsck | debugfs) echo e2fsprogs ;;
        mkfs.xfs | xfs_repair) echo xfsprogs ;;
        qemu-system-x86_64) echo qemu-system-x86 ;;
        busybox) echo busybox-static ;;
        xz) echo xz-utils ;;
        losetup | mount) echo mount ;;
        fusermount3) echo fuse3 ;;
        modprobe | depmod) echo kmod ;;
        # The server's own programs are in no PATH; this one comes with them.
        pg_ctlcluster) echo postgresql ;;
        cc) echo "gcc libc6-dev" ;;
        node) echo nodejs ;;
        borg) echo borgbackup ;;
        *) echo "$1" ;;
    esac
}

# Installs the packages of those commands that are missing. Does nothing where none is.
need() {
    local command missing="" packages=""
    for command in "$@"; do
        have "$command" || missing="$missing $command"
    done
    [ -n "$missing" ] || return 0
    have apt-get || fail "these commands are missing:$missing. Install them by your distribution's means."
    can_be_root || fail "these commands are missing:$missing. Run this as root or with sudo once, or install them."
    if [ -z "${APT_UPDATED:-}" ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq ||
            fail "the package lists cannot be fetched; these commands are missing:$missing"
        APT_UPDATED=1
    fi
    for command in $missing; do
        packages="$packages $(package_of "$command")"
    done
    # shellcheck disable=SC2086 # a list of words on purpose
    packages=$(printf '%s\n' $packages | sort -u)
    say "Installing:" $packages
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages \
        >/dev/null || fail "cannot install:" $packages
    for command in $missing; do
        have "$command" || fail "$command is still missing after the installation of its package"
    done
}

# A Rust toolchain and a linker, without which nothing is built.
need_rust() {
    if ! have cargo && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH="$HOME/.cargo/bin:$PATH"; fi
    have cargo || fail "a Rust toolchain is missing: see https://rustup.rs"
    need cc
}

# need_emulators FOLDER: servers that speak as S3 and Azure do, at fixed versions, in a folder of their own.
# The first one is a program of Python, the second one of Node.
need_emulators() {
    local folder=$1 moto=5.2.5 azurite=3.35.0
    need python3
    mkdir -p "$folder" || fail "cannot make $folder"
    if [ "$(cat "$folder/moto/version" 2>/dev/null)" != "$moto" ]; then
        python3 -c 'import ensurepip, venv' 2>/dev/null || need_package python3-venv
        say "Installing: moto $moto from PyPI"
        rm -rf "$folder/moto"
        python3 -m venv "$folder/moto" &&
            "$folder/moto/bin/pip" install --quiet --disable-pip-version-check "moto[server]==$moto" ||
            fail "cannot install moto $moto from PyPI, by which the tests of S3 are run"
        echo "$moto" >"$folder/moto/version"
    fi
    if [ "$(cat "$folder/azurite/version" 2>/dev/null)" != "$azurite" ]; then
        need node npm
        say "Installing: azurite $azurite from npm"
        rm -rf "$folder/azurite"
        mkdir -p "$folder/azurite"
        npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$folder/azurite" "azurite@$azurite" \
            >/dev/null || fail "cannot install azurite $azurite from npm, by which the tests of Azure are run"
        echo "$azurite" >"$folder/azurite/version"
    fi
}

# need_python_reader FOLDER: a Python of its own for scripts/vault-restore.py, with its two packages at fixed versions.
need_python_reader() {
    local folder=$1 cryptography=50.0.2 zstandard=0.25.0
    need python3
    mkdir -p "$folder" || fail "cannot make $folder"
    if [ "$(cat "$folder/reader/version" 2>/dev/null)" != "$cryptography $zstandard" ]; then
        python3 -c 'import ensurepip, venv' 2>/dev/null || need_package python3-venv
        say "Installing: cryptography $cryptography and zstandard $zstandard from PyPI"
        rm -rf "$folder/reader"
        python3 -m venv "$folder/reader" &&
            "$folder/reader/bin/pip" install --quiet --disable-pip-version-check \
                "cryptography==$cryptography" "zstandard==$zstandard" ||
            fail "cannot install cryptography and zstandard from PyPI, by which scripts/vault-restore.py is tested"
        echo "$cryptography $zstandard" >"$folder/reader/version"
    fi
}

# need_package NAME...: packages that no command stands for.
need_package() {
    have apt-get || fail "these packages are missing: $*. Install them by your distribution's means."
    can_be_root || fail "these packages are missing: $*. Run this as root or with sudo once, or install them."
    say "Installing: $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        fail "cannot install: $*"
}

# wait_for SECONDS COMMAND...: until the command succeeds; fails after the deadline.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.05
    done
}

# The first number of a key in pretty-printed JSON; zero if there is none.
json_number() {
    sed -n "s/.*\"$1\": *\([0-9][0-9]*\).*/\1/p" | head -n 1 | grep . || echo 0
}

# The sum of all numbers of a key in pretty-printed JSON.
json_sum() {
    sed -n "s/.*\"$1\": *\([0-9][0-9]*\).*/\1/p" | awk '{ sum += $1 } END { printf "%d\n", sum }'
}

# Seconds with fractions, for measuring.
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f", b - a }'; }
mebibytes() { awk -v n="$1" 'BEGIN { printf "%.1f MiB", n / 1048576 }'; }
