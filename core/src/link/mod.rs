//! The link between a device and its host: what the bytes on a serial line, a socket or a pipe mean.
//!
//! | module | what |
//! |---|---|
//! | [`frame`] | messages as checked frames, and back from any bytes |
//! | [`message`] | what host and device say to each other |
//! | [`reliable`] | frames in order, once, whatever the line loses |
//! | [`device`] | the device's loop over an [`engine`] |
//! | [`engine`] | what a device runs |
//! | [`client`] | the host's side |
//!
//! Nothing here does input or output, waits, allocates or looks at a clock: bytes and the time come in, bytes come out. Both
//! sides run on a microcontroller.
//!
//! # A frame
//!
//! ```text
//! frame   = COBS(header body check) 00
//! header  = sequence number (u16), acknowledged (u16), little-endian
//! body    = one message as postcard, or nothing
//! check   = CRC-32 (ISO-HDLC) of header, body and session (u32), little-endian
//! ```
//!
//! A zero byte is the end of a frame and nothing else, so whatever comes before one is forgotten with it: after any garbage the
//! next frame but one is read at the latest. A body has at most [`MAX_BODY`] bytes, so COBS takes one byte and a frame at
//! most [`MAX_FRAME`]. Empty frames are none; a sender may put zeros between frames.
//!
//! The session is part of the check and is not sent: a frame of another session is a damaged one. Session 0 is that of the
//! handshake.
//!
//! # The handshake
//!
//! The host sends [`Hello`](message::Hello) in session 0: the protocol's [`VERSION`], a number that it drew (`client`) and how
//! often it began anew (`attempt`). The device answers [`Welcome`](message::Welcome) with the session's number and what it
//! can do, or [`Rejected`](message::Greeting::Rejected) with its own version. Another client, or a later attempt, begins a new
//! session, and what was under way in the old one is cancelled; the same attempt again is answered again and changes nothing;
//! an earlier one is late and is not answered. So a Hello is also how a host asks whether the device is still there: after a
//! reconnection, and where it waits for something and hears nothing. A device that has lost its session (as it was switched
//! off) answers with another number: the host is [told](client::Event::Restarted) and begins anew.
//!
//! # Sequence numbers
//!
//! Frames with a body count up from 0 in each direction of a session. `acknowledged` is the number of the next frame that the
//! sender of the frame waits for. A receiver takes the frame it waits for and no other; one that it has no room for it
//! leaves, and the sender tries again: that is the back-pressure, nothing is ever dropped to make room. At most
//! [`WINDOW`](reliable::WINDOW) frames are under way; where their acknowledgement is missing for
//! [`Timing::retransmit`](reliable::Timing), or one without a body repeats the last, they are sent again from the oldest.
//! Frames without a body carry the number of the next frame with one, and count for nothing.
//!
//! # A completion
//!
//! ```text
//! host                                   device
//! Start { request, prompt_bytes … }  →
//!                                    ←   Accepted { request }              its turn has come
//! Prompt { request, bytes }          →                                     until prompt_bytes are there
//!                                    ←   Token { request, token, text }    one a token
//! Cancel { request }                 →                                     if it likes
//!                                    ←   Ended { request, … }              or Failed { request, … }
//! ```
//!
//! Every Start is answered in the end by exactly one Ended or Failed. Up to [`QUEUE`](device::QUEUE) wait; one more fails with
//! [`Code::Busy`](message::Code::Busy).
//!
//! Of a completion that is cancelled, at most one more token comes than the device has said when it reads the Cancel.
//!
//! # A snapshot
//!
//! What the cache holds, to go on with later or elsewhere: [its bytes](crate::snapshot), in pieces of at most
//! [`MAX_CHUNK`](message::MAX_CHUNK).
//!
//! ```text
//! host                                   device
//! Save                               →
//!                                    ←   Snapshot { bytes, checksum }      when it is made
//!                                    ←   Chunk { bytes }                   until bytes are there
//!
//! Restore { bytes, checksum }        →
//! Chunk { bytes }                    →                                     until bytes are there
//!                                    ←   Restored { tokens }               when the cache holds them
//! ```
//!
//! Either is answered by Failed without a request where it cannot be: [`Code::Busy`](message::Code::Busy) beside a request or
//! another snapshot, [`Code::Foreign`](message::Code::Foreign) for another model, policy or version,
//! [`Code::Context`](message::Code::Context) for more tokens than there is room for, [`Code::Damaged`](message::Code::Damaged)
//! where a check does not fit. Chunks are frames like all others, so that whoever has no room leaves them on the line; whoever
//! made a snapshot keeps it until its last chunk is asked for. The checksum is of all its bytes, and the last four of those are
//! one of the others: a file that is damaged on the host's disk is told from one that is damaged on the way.
//!
//! # Examples in bytes
//!
//! The numbers of variants are their places in the enums of [`message`], and stay. A token event of session 0x11223344:
//!
//! ```
//! use thinkey_core::link::{frame::{self, Header}, message::{ToHost, encode}};
//! let mut body = [0; 32];
//! let body = encode(&ToHost::Token { request: 1, token: 300, text: b" dog" }, &mut body)?;
//! assert_eq!(body, [3, 1, 0xac, 0x02, 4, b' ', b'd', b'o', b'g']);
//! let mut line = [0; 64];
//! let frame = frame::encode(0x1122_3344, Header { sequence: 5, acknowledged: 2 }, body, &mut line)?;
//! assert_eq!(frame, [
//!     2, 5, 2, 2, 14,                                       // COBS; 5, 0; 2, 0
//!     3, 1, 0xac, 0x02, 4, b' ', b'd', b'o', b'g',          // Token
//!     0xbc, 0xcb, 0xb0, 0xba, 0,                            // check, end
//! ]);
//! # Ok::<(), thinkey_core::Error>(())
//! ```
//!
//! A snapshot of 300 bytes is announced, and its second chunk (here of three bytes) follows:
//!
//! ```
//! use thinkey_core::link::message::{Snapshot, ToHost, encode};
//! let mut body = [0; 32];
//! let body = encode(&ToHost::Snapshot(Snapshot { bytes: 300, checksum: 0xcbf4_3926 }), &mut body)?;
//! assert_eq!(body, [8, 0xac, 0x02, 0xa6, 0xf2, 0xd0, 0xdf, 0x0c]);
//! let mut body = [0; 32];
//! let body = encode(&ToHost::Chunk { bytes: b"abc" }, &mut body)?;
//! assert_eq!(body, [9, 3, b'a', b'b', b'c']);
//! # Ok::<(), thinkey_core::Error>(())
//! ```
//!
//! The least there is, an acknowledgement, and the first frame of all:
//!
//! ```
//! use thinkey_core::link::{VERSION, frame::{self, Header}, message::{Greeting, Hello, encode}};
//! let mut line = [0; 64];
//! let frame = frame::encode(1, Header { sequence: 0, acknowledged: 7 }, &[], &mut line)?;
//! assert_eq!(frame, [1, 1, 2, 7, 5, 0xb4, 0x88, 0x9b, 0xc0, 0]);
//!
//! let mut body = [0; 32];
//! let hello = Greeting::Hello(Hello { version: VERSION, client: 7, attempt: 0 });
//! let body = encode(&hello, &mut body)?;
//! assert_eq!(body, [0, 1, 7, 0]);
//! let frame = frame::encode(0, Header::default(), body, &mut line)?;
//! assert_eq!(frame, [1, 1, 1, 1, 1, 3, 1, 7, 5, 0x63, 0xfd, 0xa7, 0xc0, 0]);
//! # Ok::<(), thinkey_core::Error>(())
//! ```

pub mod client;
pub mod device;
pub mod engine;
pub mod frame;
pub mod message;
pub mod reliable;

pub use client::Client;
pub use device::Device;
pub use engine::Engine;
pub use frame::{MAX_BODY, MAX_FRAME};

/// Version of the protocol.
pub const VERSION: u16 = 1;
