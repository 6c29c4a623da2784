//! Runs a small thin cache end to end with nothing but `thinkey-core` and the Linux system call that prints.
//!
//! With the feature `defmt` it logs what the core does, on file descriptor 2; `thinkey-firmware-host log` reads it.
#![no_std]
#![no_main]

#[cfg(feature = "defmt")]
mod log;
mod memory;
mod scenario;

use core::{arch::asm, panic::PanicInfo};

/// System call `number` with up to three arguments.
fn system(number: usize, a: usize, b: usize, c: usize) -> isize {
    let result;
    // SAFETY: only `write` of a live buffer and `exit` are called; the kernel clobbers rcx and r11, as declared.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Writes all of `bytes` to a file descriptor, as far as the reader takes them.
fn write(descriptor: usize, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match usize::try_from(system(1, descriptor, bytes.as_ptr() as usize, bytes.len())) {
            Ok(written @ 1..) => bytes = &bytes[written..],
            _ => return,
        }
    }
}

fn print(text: &[u8]) {
    write(1, text);
}

fn exit(code: usize) -> ! {
    system(60, code, 0, 0);
    loop {
        core::hint::spin_loop();
    }
}

core::arch::global_asm!(".globl _start", "_start:", "and rsp, -16", "call {main}", main = sym main);

extern "C" fn main() -> ! {
    #[cfg(feature = "defmt")]
    defmt::info!("{}", scenario::LAYOUT);
    match scenario::run() {
        Ok(sum) => {
            #[cfg(feature = "defmt")]
            defmt::info!("checksum {=u64:016x}", sum);
            let mut line = *b"checksum ................\n";
            for (index, digit) in line[9..25].iter_mut().enumerate() {
                *digit = b"0123456789abcdef"[(sum >> (60 - 4 * index) & 15) as usize];
            }
            print(&line);
            exit(0)
        }
        Err(_error) => {
            #[cfg(feature = "defmt")]
            defmt::error!("{}", _error);
            print(b"the scenario failed\n");
            exit(1)
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    print(b"panic\n");
    exit(101)
}
