//! Where the model's thread puts what it says, and the device's loop takes it.

use super::gone;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use thinkey_core::link::message::{Ending, Failure};

/// What the model's thread says.
pub enum Said {
    Read { done: u16, of: u16 },
    Token { token: u32, text: String },
    Rest(String),
    Ended(Result<Ending, Failure>),
    Saved(u32, Result<Vec<u8>, Failure>),
    Restored(u32, Result<u32, Failure>),
}

/// Where the thread puts what it says: one thing at a time, and no token before the last is taken. So what is not read is not
/// computed; and where a completion is cancelled, one token more is told at most, which is the last of the sequence.
#[derive(Default)]
pub struct Mailbox {
    mail: Mutex<Mail>,
    freed: Condvar,
}

#[derive(Default)]
struct Mail {
    said: Option<Said>,
    cancelled: bool,
    /// One of the two sides is gone.
    closed: bool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room and puts `said` there; false where nobody hears it.
    pub fn put(&self, said: Said) -> bool {
        let waits = |mail: &mut Mail| mail.said.is_some() && !mail.closed;
        let mut mail = self.freed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        if !mail.closed {
            mail.said = Some(said);
        }
        !mail.closed
    }

    /// Waits until what was put there is taken, or is the last that is asked for; says whether more is.
    pub fn go_on(&self) -> bool {
        let stops = |mail: &Mail| mail.closed || mail.cancelled;
        let waits = |mail: &mut Mail| mail.said.is_some() && !stops(mail);
        let mail = self.freed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        !stops(&mail)
    }

    /// What was said, if anything was.
    pub fn take(&self) -> Result<Option<Said>, Failure> {
        let mut mail = self.lock();
        let said = mail.said.take();
        if said.is_none() && mail.closed {
            return Err(gone());
        }
        self.freed.notify_one();
        Ok(said)
    }

    /// Whether the completion that is under way, or comes next, is to end.
    pub fn cancel(&self, cancelled: bool) {
        self.lock().cancelled = cancelled;
        self.freed.notify_one();
    }
}

/// Closes a mailbox, where one of its sides is dropped.
pub struct Side(pub Arc<Mailbox>);

impl Drop for Side {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.freed.notify_one();
    }
}
