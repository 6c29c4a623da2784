//! How an image ends: by telling the debugger, semihosting or QEMU, whether it went well.

use core::{fmt::Write, panic::PanicInfo};
use cortex_m_semihosting::{
    debug::{self, EXIT_FAILURE, EXIT_SUCCESS},
    hio,
};

pub fn exit(success: bool) -> ! {
    debug::exit(if success { EXIT_SUCCESS } else { EXIT_FAILURE });
    loop {
        cortex_m::asm::wfi();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if let Ok(mut console) = hio::hstderr() {
        let _ = writeln!(console, "{info}");
    }
    exit(false)
}
