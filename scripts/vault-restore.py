#!/usr/bin/env python3
"""Restores a disk from a vault in a folder, without any program of Tidemark.

Written from docs/vault-format.md alone, to prove that the page is enough. It needs Python 3.9, the package `zstandard`
where something is compressed with Zstandard (manifests always are), and for encrypted vaults the package `cryptography`,
version 44 or later, for AES-256-GCM, ChaCha20-Poly1305, HKDF and Argon2id.

In an encrypted vault everything is opened by its tags, so any changed byte ends the restore. In a plain vault nothing but
the structure is looked at: its checks are BLAKE3, which Python does not have. Use `shipper restore` where it can be had.

    vault-restore.py VAULT_FOLDER --machine NAME --list
    vault-restore.py VAULT_FOLDER --machine NAME [--point EPOCH|latest] [--disk NAME] --to FILE
"""

import argparse
import hashlib
import hmac
import json
import os
import re
import struct
import sys

BLOCK = 4096
FRAME_NONE = 0xFFFFFFFF
DOCUMENT_BYTES_MAX = 1 << 30
DIRECTORY_BYTES_MAX = 256 << 20
KEY_TABLE_BYTES_MAX = 64 << 10
MANIFEST_MAGIC = b"TMMAN\r\n\x1a"
RECORD_MAGIC = b"TMREC\r\n\x1a"
SEGMENT_MAGIC = b"TMSEG\r\n\x1a"
DOMAIN_WHOLE, DOMAIN_FRAME, DOMAIN_DIRECTORY = 0, 1, 2
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SEGMENT_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{8})")


class Refused(Exception):
    """Why nothing is restored, for people."""


def need(condition, what):
    if not condition:
        raise Refused(what)


def package(name, version=""):
    try:
        return __import__(name)
    except ImportError as error:
        raise Refused(f"the package {name}{version} is missing: pip install '{name}{version}'") from error


# Compression


def zstd_decompress(packed, size, what):
    zstandard = package("zstandard")
    try:
        # One byte more than there may be shows what is too long, and bounds what a damaged frame can ask for.
        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            raw = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise Refused(f"{what}: it cannot be decompressed: {error}") from error
    need(len(raw) == size, f"{what}: it does not have the size that it should have")
    return raw


def lz4_length(packed, at, length):
    """A length whose four bits were 15 goes on in bytes, up to one that is not 255."""
    if length == 15:
        while True:
            more = packed[at]
            at += 1
            length += more
            if more != 255:
                break
    return length, at


def lz4_decompress(packed, size, what):
    """One block of the LZ4 block format: literals and a match, again and again; the last sequence has no match."""
    raw = bytearray()
    at = 0
    try:
        while True:
            token = packed[at]
            literals, at = lz4_length(packed, at + 1, token >> 4)
            need(at + literals <= len(packed), f"{what}: its LZ4 block is cut short")
            raw += packed[at : at + literals]
            at += literals
            if at == len(packed):
                break
            offset = packed[at] | packed[at + 1] << 8
            match, at = lz4_length(packed, at + 2, token & 15)
            match += 4
            need(0 < offset <= len(raw), f"{what}: its LZ4 block points out of itself")
            need(len(raw) + match <= size, f"{what}: its LZ4 block is too large")
            # A match may reach into what it makes: then what lies before it repeats.
            piece = raw[len(raw) - offset :][:match]
            raw += (piece * (match // len(piece) + 1))[:match]
    except IndexError as error:
        raise Refused(f"{what}: its LZ4 block is cut short") from error
    need(len(raw) == size, f"{what}: it does not have the size that it should have")
    return bytes(raw)


def decompress(codec, packed, size, what):
    if codec == 0:
        need(len(packed) == size, f"{what}: it does not have the size that it should have")
        return packed
    if codec == 1:
        return lz4_decompress(packed, size, what)
    need(codec == 2, f"{what}: codec {codec} is not known")
    return zstd_decompress(packed, size, what)


# Encryption


class Cipher:
    def __init__(self, name):
        package("cryptography", ">=44")
        from cryptography.hazmat.primitives.ciphers import aead

        kinds = {"aes-256-gcm": aead.AESGCM, "chacha20-poly1305": aead.ChaCha20Poly1305}
        need(name in kinds, f"vault.json: the cipher {name!r} is not known")
        self.name = name
        self.kind = kinds[name]

    def open(self, key, nonce, sealed, associated):
        """The text, or None: it, its nonce or its associated data are not those that were sealed."""
        from cryptography.exceptions import InvalidTag

        try:
            return self.kind(key).decrypt(nonce, sealed, associated)
        except InvalidTag:
            return None


def hkdf(material, salt, info):
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), 32, salt, info).derive(material)


def argon2id(passphrase, salt, cost):
    try:
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
    except ImportError as error:
        raise Refused("this version of the package cryptography lacks Argon2id: install 44 or later") from error
    memory, iterations, lanes = (cost[name] for name in ("memory_kib", "iterations", "parallelism"))
    fits = 1 <= lanes <= 16 and 1 <= iterations <= 16 and 8 * lanes <= memory <= 1 << 20
    need(fits, "a key slot asks for more memory or time than one may")
    kdf = Argon2id(salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
    return kdf.derive(passphrase)


def nonce_of(domain, number):
    return struct.pack("<B3xI4x", domain, number)


class Keys:
    """What comes from the root key of an encrypted vault."""

    def __init__(self, root, vault, cipher):
        self.root, self.vault, self.cipher = root, vault, cipher

    def of(self, use):
        return hkdf(self.root, bytes.fromhex(self.vault), f"tidemark vault 2 {use}".encode())

    def mac(self, use, *parts):
        return hmac.new(self.of(use), b"".join(parts), hashlib.sha256).digest()

    def identity(self, kind, *parts):
        return "\n".join((f"tidemark vault 2 {kind}", self.vault) + parts + ("",)).encode()

    def open_object(self, content, magic, version, use, identity, what):
        """The text of an object that is sealed as a whole."""
        need(len(content) >= 64 + 16, f"{what}: it is cut short")
        found, number, flags = struct.unpack_from("<8sII", content)
        sealed_bytes, reserved = struct.unpack_from("<QQ", content, 48)
        need(found == magic, f"{what}: it does not begin like what it is named")
        need((number, flags) == (version, 0), f"{what}: version {number} is not known")
        need(sealed_bytes == len(content) - 64 and reserved == 0, f"{what}: its header contradicts its size")
        key = hkdf(self.of(use), content[16:48], identity)
        text = self.cipher.open(key, nonce_of(DOMAIN_WHOLE, 0), content[64:], identity + content[:64])
        need(text is not None, f"{what}: it is damaged, or it stands in another object's place")
        return text


def fields_of(value, known, what, optional=()):
    """A JSON object that has these fields and no others."""
    need(isinstance(value, dict), f"{what}: it is no JSON object")
    unknown = set(value) - set(known) - set(optional)
    need(not unknown, f"{what}: it has fields that are not known: {', '.join(sorted(unknown))}")
    missing = set(known) - set(value)
    need(not missing, f"{what}: it lacks {', '.join(sorted(missing))}")
    return value


def parse_json(text, what):
    try:
        return json.loads(text)
    except ValueError as error:
        raise Refused(f"{what}: it is malformed: {error}") from error


def hexadecimal(text, count, what):
    need(isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{2 * count}}}", text), f"{what}: digits are wrong")
    return bytes.fromhex(text)


# The vault


class Vault:
    """A vault in a folder, plain or unlocked."""

    def __init__(self, folder, secret):
        self.folder = folder
        content = self.read("vault.json")
        file = parse_json(content, "vault.json")
        need(isinstance(file, dict), "vault.json: it is no JSON object")
        self.keys = None
        if file.get("format") == 1:
            fields_of(file, ("format", "vault", "created", "root_key", "key_slots"), "vault.json")
            need(file["key_slots"] == [], "vault.json: it has key slots, which a plain vault has not")
            need(secret is None, "the vault is not encrypted: leave out the key file or passphrase")
        else:
            need(file.get("format") == 2, f"vault.json: format {file.get('format')!r} is not known")
            fields_of(file, ("format", "vault", "created", "cipher"), "vault.json")
        self.id = file["vault"]
        hexadecimal(self.id, 16, "vault.json")
        if file["format"] == 2:
            need(secret is not None, "the vault is encrypted: give --key-file or --passphrase-file")
            self.keys = self.unlock(content, Cipher(file["cipher"]), secret)

    def path(self, key):
        return os.path.join(self.folder, *key.split("/"))

    def read(self, key):
        try:
            with open(self.path(key), "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise Refused(f"{key}: there is no such object in the vault {self.folder}") from error

    def names(self, prefix):
        try:
            return sorted(os.listdir(self.path(prefix)))
        except FileNotFoundError:
            return []

    def unlock(self, vault_file, cipher, secret):
        number = 0
        while os.path.exists(self.path(f"keys/{number + 1}")):
            number += 1
        need(number > 0, "keys/1: the vault is encrypted, and its key table is missing")
        what = f"keys/{number}"
        content = self.read(what)
        need(len(content) <= KEY_TABLE_BYTES_MAX, f"{what}: it is too large")
        lines = content.split(b"\n")
        need(len(lines) == 3 and lines[2] == b"", f"{what}: it does not have two lines")
        table = fields_of(parse_json(lines[0], what), ("number", "slots"), what)
        need(table["number"] == number, f"{what}: it is the table {table['number']}")
        for slot in table["slots"]:
            root = open_slot(slot, self.id, cipher, secret, what)
            if root is not None:
                break
        else:
            raise Refused("the key file or passphrase opens no key slot of the vault")
        keys = Keys(root, self.id, cipher)
        check = keys.mac("key tables", struct.pack("<Q", len(vault_file)), vault_file, lines[0] + b"\n")
        right = hmac.compare_digest(lines[1], b'{"check":"%s"}' % check.hex().encode())
        need(right, f"{what}: it or vault.json was changed by somebody without the key")
        return keys

    def machine_prefix(self, machine):
        if self.keys is None:
            return f"machines/{machine}"
        return "machines/" + self.keys.mac("names", f"machine\n{machine}".encode())[:16].hex()

    def segment_key(self, machine, disk, name):
        folder = disk
        if self.keys is not None:
            folder = self.keys.mac("names", f"disk\n{machine}\n{disk}".encode())[:16].hex()
        return f"{self.machine_prefix(machine)}/disks/{folder}/segments/{name}.segment"

    def points(self, machine):
        """Epochs of the recovery points, as 16 digits, ascending; those that a boundary makes void are none."""
        names = self.names(f"{self.machine_prefix(machine)}/points")
        epochs = [name[:16] for name in names if re.fullmatch(r"[0-9a-f]{16}\.manifest", name)]
        boundary = self.boundary(machine)
        if boundary is None:
            return epochs
        return [epoch for epoch in epochs if self.is_point(machine, int(epoch, 16), boundary)]

    def boundary(self, machine):
        """The newest boundary, if there is one."""
        prefix = f"{self.machine_prefix(machine)}/boundaries"
        numbers = [name for name in self.names(prefix) if re.fullmatch(r"[0-9a-f]{16}", name)]
        if not numbers:
            return None
        return self.record(f"{prefix}/{numbers[-1]}", "boundary", machine, numbers[-1])

    def is_point(self, machine, epoch, boundary):
        if epoch <= boundary["through"]:
            return epoch in boundary["kept"]
        manifest = self.manifest(machine, f"{epoch:016x}")
        return manifest["generation"] >= boundary["generation"] and manifest["previous"] >= boundary["through"]

    def set_aside(self, machine):
        """Why points are set aside, by their epochs."""
        prefix = f"{self.machine_prefix(machine)}/aside"
        epochs = [name for name in self.names(prefix) if re.fullmatch(r"[0-9a-f]{16}", name)]
        return {epoch: self.record(f"{prefix}/{epoch}", "aside", machine, epoch)["why"] for epoch in epochs}

    def record(self, key, kind, machine, name):
        content = self.read(key)
        if self.keys is not None:
            identity = self.keys.identity(kind, machine, name)
            return sealed_document(self.keys.open_object(content, RECORD_MAGIC, 1, "records", identity, key), key)
        version, document = plain_document(content, RECORD_MAGIC, key)
        need(version == 1, f"{key}: version {version} is not known")
        return document

    def manifest(self, machine, epoch):
        key = f"{self.machine_prefix(machine)}/points/{epoch}.manifest"
        content = self.read(key)
        if self.keys is not None:
            identity = self.keys.identity("manifest", machine, epoch)
            text = self.keys.open_object(content, MANIFEST_MAGIC, 3, "manifests", identity, key)
            document = sealed_document(text, key)
        else:
            version, document = plain_document(content, MANIFEST_MAGIC, key)
            need(version in (1, 2), f"{key}: version {version} is not known")
        check_manifest(document, key)
        found = (document["vault"], document["machine"], document["epoch"])
        need(found == (self.id, machine, int(epoch, 16)), f"{key}: it is of point {found[2]} of {found[1]}")
        return document


def open_slot(slot, vault, cipher, secret, what):
    """The root key, or None: the secret is not this slot's."""
    known = ("id", "kind", "label", "created", "salt", "nonce", "wrapped")
    fields_of(slot, known, what, ("argon2",))
    kind, content = secret
    if slot["kind"] != kind:
        return None
    salt = hexadecimal(slot["salt"], 16, what)
    cost = (0, 0, 0)
    if kind == "passphrase":
        argon2 = fields_of(slot.get("argon2"), ("memory_kib", "iterations", "parallelism"), what)
        cost = (argon2["memory_kib"], argon2["iterations"], argon2["parallelism"])
        content = argon2id(content, salt, argon2)
    key = hkdf(content, salt, b"tidemark vault 2 key slot")
    words = ("tidemark vault 2 key slot", vault, slot["id"], kind, cipher.name) + tuple(map(str, cost))
    associated = "".join(f"{word}\n" for word in words).encode()
    nonce, wrapped = hexadecimal(slot["nonce"], 12, what), hexadecimal(slot["wrapped"], 48, what)
    return cipher.open(key, nonce, wrapped, associated)


def plain_document(content, magic, what):
    """Version and document of an object of a plain vault. Its check is BLAKE3, and left out."""
    need(len(content) >= 48, f"{what}: it is cut short")
    found, version, flags, document_bytes, stored_bytes = struct.unpack_from("<8sIIQQ", content)
    need(found == magic, f"{what}: it does not begin like what it is named")
    need(flags == 0, f"{what}: flags are not known")
    need(stored_bytes == len(content) - 48, f"{what}: its header contradicts its size")
    need(document_bytes <= DOCUMENT_BYTES_MAX, f"{what}: its document is too large")
    return version, parse_json(zstd_decompress(content[48:], document_bytes, what), what)


def sealed_document(text, what):
    need(len(text) >= 8, f"{what}: it is cut short")
    (document_bytes,) = struct.unpack_from("<Q", text)
    need(document_bytes <= DOCUMENT_BYTES_MAX, f"{what}: its document is too large")
    return parse_json(zstd_decompress(text[8:], document_bytes, what), what)


def check_manifest(document, what):
    known = ("vault", "machine", "generation", "epoch", "previous", "created", "disks")
    fields_of(document, known, what, ("consistency", "reason"))
    for disk in document["disks"]:
        fields_of(disk, ("name", "size_bytes", "block_bytes", "journal", "dirty_blocks", "segments"), what)
        size = disk["size_bytes"]
        need(disk["block_bytes"] == BLOCK and size > 0 and size % 512 == 0, f"{what}: sizes are wrong")
        for segment in disk["segments"]:
            known = ("name", "bytes", "directory_bytes", "check", "data_blocks", "zero_blocks")
            fields_of(segment, known, what)
            need(SEGMENT_NAME.fullmatch(segment["name"]), f"{what}: a segment has no name")


# Segments


class Segment:
    """One object: its frames, as (offset, stored bytes, blocks, codec, number, tag), and its extents."""

    def __init__(self, vault, machine, disk, named):
        self.what = vault.segment_key(machine, disk, named["name"])
        self.content = vault.read(self.what)
        self.keys = vault.keys
        need(len(self.content) == named["bytes"], f"{self.what}: it has {len(self.content)} bytes, not {named['bytes']}")
        need(named["directory_bytes"] <= DIRECTORY_BYTES_MAX, f"{self.what}: its directory is too large")
        version = 1 if self.keys is None else 2
        right = self.content[:16] == SEGMENT_MAGIC + struct.pack("<II", version, 0)
        need(right, f"{self.what}: it does not begin like a segment of version {version}")
        if self.keys is None:
            tables = self.open_plain(vault, named)
        else:
            tables = self.open_sealed(machine, disk, named)
        self.split(*tables, named)

    def open_plain(self, vault, named):
        need(len(self.content) >= 16 + 144, f"{self.what}: it is cut short")
        footer = struct.unpack("<16s16sQQQIIQQIIQQ16s16s8s", self.content[-144:])
        vault_id, _, *name, flags, offset, size, frames, extents, data, zero, _, check, magic = footer
        need(magic == b"TMSEGEND" and flags == 0, f"{self.what}: it does not end like a segment")
        same = "%016x-%016x-%016x-%08x" % tuple(name) == named["name"] and check.hex() == named["check"]
        need(same and vault_id.hex() == vault.id, f"{self.what}: it is not the segment that the manifest names")
        need(offset + size + 144 == named["bytes"] and size == named["directory_bytes"], f"{self.what}: sizes differ")
        return offset, self.content[offset : offset + size], frames, extents, data, zero

    def open_sealed(self, machine, disk, named):
        need(len(self.content) >= 16 + 16 + 64, f"{self.what}: it is cut short")
        footer = self.content[-64:]
        salt, offset, size, version, flags, magic = struct.unpack("<32sQQII8s", footer)
        need(magic == b"TMSEGEN2", f"{self.what}: it does not end like a sealed segment")
        need((version, flags) == (2, 0), f"{self.what}: version {version} is not known")
        need(offset + size + 64 == named["bytes"] and size == named["directory_bytes"], f"{self.what}: sizes differ")
        sealed = self.content[offset : offset + size]
        need(sealed[-16:].hex() == named["check"], f"{self.what}: it is not the segment that the manifest names")
        self.identity = self.keys.identity("segment", machine, disk, named["name"])
        self.key = hkdf(self.keys.of("segments"), salt, self.identity)
        associated = self.identity + struct.pack("<BBHI", DOMAIN_DIRECTORY, 0, 0, 0) + footer
        text = self.keys.cipher.open(self.key, nonce_of(DOMAIN_DIRECTORY, 0), sealed, associated)
        need(text is not None, f"{self.what}: its directory is damaged")
        need(len(text) >= 32, f"{self.what}: its directory is cut short")
        frames, extents, data, zero, _ = struct.unpack_from("<IIQQQ", text)
        return offset, text[32:], frames, extents, data, zero

    def split(self, end, tables, frame_count, extent_count, data_blocks, zero_blocks, named):
        what = self.what
        need(len(tables) == 32 * frame_count + 24 * extent_count + 16 * data_blocks, f"{what}: tables do not fit")
        self.frames = []
        offset = 16
        for at in range(0, 32 * frame_count, 32):
            if self.keys is None:
                place, stored, blocks, codec, _, tag = struct.unpack_from("<QIHBB16s", tables, at)
                need(place == offset, f"{what}: a frame does not follow the one before it")
                number = 0
            else:
                number, stored, blocks, codec, _, tag = struct.unpack_from("<IIHB5s16s", tables, at)
            need(1 <= blocks <= 32 and stored <= blocks * BLOCK, f"{what}: a frame has no valid size")
            self.frames.append((offset, stored, blocks, codec, number, tag))
            offset += stored
        need(offset == end, f"{what}: its frames do not end where its directory begins")
        need(sum(frame[2] for frame in self.frames) == data_blocks, f"{what}: blocks are missing")
        extents = struct.iter_unpack("<QIIII", tables[32 * frame_count : 32 * frame_count + 24 * extent_count])
        self.extents = [extent[:4] for extent in extents]
        next_block = zero = 0
        for first, count, frame, frame_block in self.extents:
            need(first >= next_block and count > 0, f"{what}: its extents are not in order")
            next_block = first + count
            if frame == FRAME_NONE:
                zero += count
            else:
                fits = frame < frame_count and frame_block + count <= self.frames[frame][2]
                need(fits, f"{what}: an extent has no place in its frame")
        counts = (data_blocks, zero_blocks, zero) == (named["data_blocks"], named["zero_blocks"], zero_blocks)
        need(counts, f"{what}: the manifest names other numbers of blocks")

    def frame(self, index):
        """The blocks of a frame."""
        offset, stored, blocks, codec, number, tag = self.frames[index]
        packed = self.content[offset : offset + stored]
        what = f"{self.what}: the frame at offset {offset}"
        if self.keys is not None:
            associated = self.identity + struct.pack("<BBHI", DOMAIN_FRAME, codec, blocks, number)
            packed = self.keys.cipher.open(self.key, nonce_of(DOMAIN_FRAME, number), packed + tag, associated)
            need(packed is not None, f"{what} is damaged")
        return decompress(codec, packed, blocks * BLOCK, what)


# Restoring


def write_segment(segment, target, size):
    def write(first_block, data):
        offset = first_block * BLOCK
        if offset < size:
            target.seek(offset)
            target.write(data[: size - offset])

    by_frame = {}
    for first, count, frame, frame_block in segment.extents:
        if frame != FRAME_NONE:
            by_frame.setdefault(frame, []).append((first, count, frame_block))
            continue
        # What is behind the end of the disk may be any number of blocks.
        end = min(first + count, -(-size // BLOCK))
        while first < end:
            step = min(256, end - first)
            write(first, bytes(step * BLOCK))
            first += step
    for frame, extents in sorted(by_frame.items()):
        raw = segment.frame(frame)
        for first, count, frame_block in extents:
            write(first, raw[frame_block * BLOCK : (frame_block + count) * BLOCK])


def choose_point(vault, machine, wanted):
    points = vault.points(machine)
    need(points, f"the vault has no recovery point of machine {machine}")
    aside = vault.set_aside(machine)
    if wanted == "latest":
        good = [epoch for epoch in points if epoch not in aside]
        need(good, f"all recovery points of machine {machine} are set aside; of the last one: {aside.get(points[-1])}")
        return good[-1]
    need(re.fullmatch("[0-9a-f]{1,16}", wanted), f"{wanted!r} is no recovery point: use `latest` or its digits")
    epoch = wanted.rjust(16, "0")
    need(epoch in points, f"machine {machine} has no recovery point {epoch}")
    need(epoch not in aside, f"recovery point {epoch} is set aside: {aside.get(epoch)}")
    return epoch


def choose_disk(manifest, wanted):
    names = [disk["name"] for disk in manifest["disks"]]
    if wanted is None:
        need(len(names) == 1, f"name one of the disks: {', '.join(names)}")
        return manifest["disks"][0]
    need(wanted in names, f"there is no disk {wanted!r}, there are: {', '.join(names)}")
    return manifest["disks"][names.index(wanted)]


def restore(vault, machine, point, disk, path):
    epoch = choose_point(vault, machine, point)
    disk = choose_disk(vault.manifest(machine, epoch), disk)
    need(not os.path.lexists(path), f"{path} exists: name a new file")
    partial = path + ".partial"
    # Until everything is there, the file does not have its name.
    with open(partial, "xb") as target:
        try:
            target.truncate(disk["size_bytes"])
            for named in disk["segments"]:
                write_segment(Segment(vault, machine, disk["name"], named), target, disk["size_bytes"])
            target.flush()
            os.fsync(target.fileno())
            os.rename(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    print(f"Disk {disk['name']} at recovery point {epoch} restored to {path}: {disk['size_bytes']} bytes")


def list_points(vault, machine):
    points = vault.points(machine)
    need(points, f"the vault has no recovery point of machine {machine}")
    aside = vault.set_aside(machine)
    for epoch in points:
        if epoch in aside:
            print(f"{epoch}  set aside: {aside[epoch]}")
            continue
        manifest = vault.manifest(machine, epoch)
        disks = ", ".join(f"{disk['name']} ({disk['size_bytes']} bytes)" for disk in manifest["disks"])
        print(f"{epoch}  {manifest['created']}  {disks}")


def secret_of(arguments):
    if arguments.key_file is not None:
        with open(arguments.key_file, "rb") as file:
            content = file.read()
        need(re.fullmatch(rb"[0-9a-f]{64}\n?", content), f"{arguments.key_file} is no key file: 64 hexadecimal digits")
        return "key-file", bytes.fromhex(content[:64].decode())
    if arguments.passphrase_file is not None:
        with open(arguments.passphrase_file, "rb") as file:
            content = file.read()
        for ending in (b"\r\n", b"\n"):
            if content.endswith(ending):
                content = content[: -len(ending)]
                break
        return "passphrase", content
    return None


def main():
    parser = argparse.ArgumentParser(description="Restores a disk from a vault in a folder, by docs/vault-format.md alone.")
    parser.add_argument("vault", metavar="VAULT_FOLDER")
    parser.add_argument("--machine", required=True, help="name of the machine")
    parser.add_argument("--point", default="latest", help="digits of a recovery point; the latest without it")
    parser.add_argument("--disk", help="name of the disk, where there are several")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", metavar="FILE", help="the new file")
    what.add_argument("--list", action="store_true", help="list the recovery points")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--key-file", metavar="FILE")
    secret.add_argument("--passphrase-file", metavar="FILE")
    arguments = parser.parse_args()
    try:
        need(NAME.fullmatch(arguments.machine), f"{arguments.machine!r} is no name of a machine")
        vault = Vault(arguments.vault, secret_of(arguments))
        if arguments.list:
            list_points(vault, arguments.machine)
        else:
            restore(vault, arguments.machine, arguments.point, arguments.disk, arguments.to)
    except (Refused, OSError) as error:
        print(f"vault-restore: {error}", file=sys.stderr)
        return 1
    except (struct.error, KeyError, TypeError, ValueError, AttributeError) as error:
        # Only a vault that was changed in a way that its structure does not show leads here.
        print(f"vault-restore: the vault is malformed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
