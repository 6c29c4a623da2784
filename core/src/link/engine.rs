//! What a [device](super::Device) runs: a model on a board, or whatever stands for one in a test.

use super::message::{Capabilities, Ending, Failure, Snapshot, Start, Stats};
#[cfg(doc)]
use super::message::{End, MAX_TEXT};

/// What happened in a step of an [`Engine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Nothing yet: the work goes on elsewhere.
    Pending,
    /// The prompt is through so many parts of so many.
    Read {
        /// Parts done.
        done: u16,
        /// Parts there are.
        of: u16,
    },
    /// The next token.
    Token {
        /// Its number.
        token: u32,
        /// The characters that it completes; at most [`MAX_TEXT`] bytes, the rest comes as [`Step::Text`].
        text: &'a [u8],
    },
    /// More text of the last token.
    Text {
        /// At most [`MAX_TEXT`] bytes.
        text: &'a [u8],
    },
    /// The completion is through.
    Ended(Ending),
}

/// What a device runs. One completion is under way at a time, and no call waits for long: what takes longer than a token is
/// done elsewhere while [`step`](Self::step) says [`Step::Pending`].
pub trait Engine {
    /// What it can do.
    fn capabilities(&self) -> Capabilities<'_>;

    /// A completion is to begin; its prompt follows.
    ///
    /// # Errors
    /// Why it cannot be; there is none then.
    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure>;

    /// The next bytes of the prompt.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn prompt(&mut self, bytes: &[u8]) -> Result<(), Failure>;

    /// The prompt is whole.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn begin(&mut self) -> Result<(), Failure>;

    /// Goes on with the completion.
    ///
    /// # Errors
    /// What ended it.
    fn step(&mut self) -> Result<Step<'_>, Failure>;

    /// The completion is to end: within a token [`step`](Self::step) says so, with [`End::Cancelled`] or another end that
    /// came first. One whose prompt is not whole ends at once, and no step follows.
    fn cancel(&mut self);

    /// What the cache takes and does.
    fn stats(&self) -> Stats;

    /// Bytes of memory that are free, if it knows.
    fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// A snapshot of what the cache holds is to be made. No completion is under way. Where who asked for it is gone before it
    /// is there, it is not asked for any more, and anything else may come next.
    ///
    /// # Errors
    /// Why there is none.
    fn save(&mut self) -> Result<(), Failure>;

    /// The snapshot, once it is there: it is [read](Self::read_snapshot) next.
    ///
    /// # Errors
    /// Why there is none.
    fn saved(&mut self) -> Result<Option<Snapshot>, Failure>;

    /// Copies bytes of the snapshot from `offset` on to the front of `out`; returns how many. They are read once, in order.
    fn read_snapshot(&mut self, offset: u32, out: &mut [u8]) -> usize;

    /// A snapshot is to be restored; its bytes follow. No completion is under way.
    ///
    /// # Errors
    /// Why it cannot be.
    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Failure>;

    /// The next bytes of the snapshot to restore.
    ///
    /// # Errors
    /// Why they are of no use; what the cache held is there as before, or gone.
    fn write_snapshot(&mut self, bytes: &[u8]) -> Result<(), Failure>;

    /// All bytes of the snapshot are there: the tokens that the cache holds, once it holds them. As for [`save`](Self::save),
    /// anything else may come before.
    ///
    /// # Errors
    /// As [`write_snapshot`](Self::write_snapshot).
    fn restored(&mut self) -> Result<Option<u32>, Failure>;
}
