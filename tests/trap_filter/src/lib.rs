//! A filter that traps when it is asked to: what becomes of the streams that a virtual machine held when it failed.
//!
//! A request with `x-trap: hold` is held and never let go; one with `x-trap: trap` traps; all others go on.
#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code)]

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Trap));
}}

struct Trap;

impl Context for Trap {}

impl RootContext for Trap {
    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Trap))
    }
}

impl HttpContext for Trap {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        match self.get_http_request_header("x-trap").as_deref() {
            Some("hold") => Action::Pause,
            Some("trap") => core::arch::wasm32::unreachable(),
            _ => Action::Continue,
        }
    }
}
