//! Asking for a passphrase on the terminal, without showing it.
//!
//! While it is typed, the terminal neither echoes nor makes signals of keys: a signal would end the program and leave the
//! terminal as it is. Ctrl-C ends the line instead, and is an answer.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;

use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};
use shipper::error::{Error, ErrorKind, Result};
use shipper::keys::secret::SecretText;
use shipper::keys::source::checked;

/// Longest passphrase that can be typed, in bytes.
const BYTES_MAX: usize = 1024;
const CTRL_C: u8 = 3;

/// Asks for the passphrase of a vault; `None`: standard input is no terminal.
///
/// # Errors
///
/// The terminal cannot be read, or the answer is none.
pub fn passphrase() -> Result<Option<SecretText>> {
    ask("Passphrase of the vault: ")
}

/// Asks for a new passphrase, twice; `None`: standard input is no terminal.
///
/// # Errors
///
/// As for [`passphrase`]; `Invalid`: the two differ.
pub fn new_passphrase() -> Result<Option<SecretText>> {
    let Some(first) = ask("New passphrase: ")? else {
        return Ok(None);
    };
    match ask("The same again: ")? {
        Some(second) if second == first => Ok(Some(first)),
        _ => Err(Error::new(
            ErrorKind::Invalid,
            "The two passphrases differ; nothing was changed",
        )),
    }
}

/// The terminal as it was, restored with its value.
struct Quiet<'a> {
    terminal: &'a std::io::Stdin,
    before: Termios,
}

impl<'a> Quiet<'a> {
    fn new(terminal: &'a std::io::Stdin) -> Result<Self> {
        let failed = |errno| Error::io("Cannot set the terminal", errno);
        let before = tcgetattr(terminal.as_fd()).map_err(failed)?;
        let mut quiet = before.clone();
        quiet
            .local_flags
            .remove(LocalFlags::ECHO | LocalFlags::ISIG);
        quiet.local_flags.insert(LocalFlags::ICANON);
        quiet.control_chars[SpecialCharacterIndices::VEOL as usize] = CTRL_C;
        tcsetattr(terminal.as_fd(), SetArg::TCSAFLUSH, &quiet).map_err(failed)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        let _gone = tcsetattr(self.terminal.as_fd(), SetArg::TCSAFLUSH, &self.before);
    }
}

fn ask(prompt: &str) -> Result<Option<SecretText>> {
    let terminal = std::io::stdin();
    if !terminal.is_terminal() {
        return Ok(None);
    }
    let quiet = Quiet::new(&terminal)?;
    let mut out = std::io::stderr();
    // Where nobody sees the question, the answer still counts.
    let _unseen = out.write_all(prompt.as_bytes());
    let mut line = Vec::with_capacity(BYTES_MAX);
    let ended = read_line(&terminal, &mut line);
    drop(quiet);
    let _unseen = out.write_all(b"\n");
    // Taken over before anything can fail, so that it is wiped.
    let typed = SecretText::new(line);
    match ended? {
        CTRL_C => Err(Error::new(ErrorKind::Stopped, "No passphrase was given")),
        _ => checked(typed.bytes().to_vec(), "the terminal").map(Some),
    }
}

/// Reads up to the end of the line, past the buffer of the standard library, which nobody wipes; returns what ended it.
fn read_line(terminal: &std::io::Stdin, line: &mut Vec<u8>) -> Result<u8> {
    let mut byte = [0];
    loop {
        let count = nix::unistd::read(terminal.as_fd(), &mut byte)
            .map_err(|errno| Error::io("Cannot read the passphrase", errno))?;
        match (count, byte[0]) {
            (0, _) => return Ok(CTRL_C),
            (_, end @ (b'\n' | CTRL_C)) => return Ok(end),
            (_, other) if line.len() < BYTES_MAX => line.push(other),
            _ => return Err(Error::new(ErrorKind::Invalid, "The passphrase is too long")),
        }
    }
}
