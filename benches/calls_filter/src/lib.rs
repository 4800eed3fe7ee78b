//! A filter that makes calls to the host and does nothing else: what of Trimtab's cost is the boundary between Envoy and
//! WebAssembly, and no code of ours could save.
//!
//! Its configuration lists the calls: "read write count | status count" reads all headers, writes one and adds to a
//! counter for each request, and reads the status and adds to a counter for each response; "clock" asks for the time, and
//! "look" for a counter's value. `pack` gives it the callbacks that Trimtab has.
#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code)]

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MapType, MetricType};
use std::rc::Rc;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_header_map_pairs(map: MapType, data: *mut *mut u8, size: *mut usize) -> u32;
    fn proxy_get_header_map_value(
        map: MapType,
        name: *const u8,
        name_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> u32;
    fn proxy_replace_header_map_value(
        map: MapType,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> u32;
    fn proxy_define_metric(kind: MetricType, name: *const u8, name_size: usize, id: *mut u32) -> u32;
    fn proxy_increment_metric(id: u32, offset: i64) -> u32;
    fn proxy_get_metric(id: u32, value: *mut u64) -> u32;
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u16;
}

/// WASI's monotonic clock.
const MONOTONIC: u32 = 1;

/// What the writes write, one after the other: as Trimtab does.
const HEADERS: [(&str, &str); 2] =
    [("x-trimtab-subset", "v1"), ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-b7ad6b7169203331-01")];

// `pack` looks for both, because Trimtab has them.
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_receive(_root: u32, _token: u32, _size: usize) {}
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_close(_root: u32, _token: u32, _status: u32) {}

/// A call to the host.
enum Call {
    Read,
    Write((&'static str, &'static str)),
    Status,
    Count(u32),
    Look(u32),
    Clock,
}

/// The calls for each request, and for each response.
#[derive(Default)]
struct Calls {
    request: Vec<Call>,
    response: Vec<Call>,
}

// SAFETY of all calls below: every pointer comes from a live slice with its own length, or from a local that the call
// fills; the host keeps none, and gives up what it hands over.
impl Calls {
    /// Reads a configuration. `None` where a word is no call.
    fn read(text: &str) -> Option<Calls> {
        let (request, response) = text.split_once('|').unwrap_or((text, ""));
        let mut headers = HEADERS.into_iter();
        let mut list =
            |words: &str| words.split_whitespace().map(|word| Call::read(word, &mut headers)).collect::<Option<_>>();
        Some(Calls { request: list(request)?, response: list(response)? })
    }
}

impl Call {
    fn read(word: &str, headers: &mut impl Iterator<Item = (&'static str, &'static str)>) -> Option<Call> {
        Some(match word {
            "read" => Call::Read,
            "write" => Call::Write(headers.next()?),
            "status" => Call::Status,
            "count" => Call::Count(counter()),
            "look" => Call::Look(counter()),
            "clock" => Call::Clock,
            _ => return None,
        })
    }

    fn make(&self) {
        let mut data = std::ptr::null_mut();
        let mut size = 0;
        match *self {
            Call::Read => unsafe { proxy_get_header_map_pairs(MapType::HttpRequestHeaders, &mut data, &mut size) },
            Call::Status => unsafe {
                let name = ":status";
                proxy_get_header_map_value(
                    MapType::HttpResponseHeaders,
                    name.as_ptr(),
                    name.len(),
                    &mut data,
                    &mut size,
                )
            },
            Call::Write((name, value)) => unsafe {
                let map = MapType::HttpRequestHeaders;
                proxy_replace_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len())
            },
            Call::Count(id) => unsafe { proxy_increment_metric(id, 1) },
            Call::Look(id) => unsafe { proxy_get_metric(id, &mut 0) },
            Call::Clock => unsafe { clock_time_get(MONOTONIC, 0, &mut 0) }.into(),
        };
        if !data.is_null() {
            drop(unsafe { Vec::from_raw_parts(data, size, size) });
        }
    }
}

fn counter() -> u32 {
    let (name, mut id) = ("calls.counted", 0);
    unsafe { proxy_define_metric(MetricType::Counter, name.as_ptr(), name.len(), &mut id) };
    id
}

#[derive(Default)]
struct Root {
    calls: Rc<Calls>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let text = self.get_plugin_configuration().unwrap_or_default();
        let calls = std::str::from_utf8(&text).ok().and_then(Calls::read);
        let is_read = calls.is_some();
        self.calls = Rc::new(calls.unwrap_or_default());
        is_read
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { calls: Rc::clone(&self.calls) }))
    }
}

struct Stream {
    calls: Rc<Calls>,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.calls.request.iter().for_each(Call::make);
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        self.calls.response.iter().for_each(Call::make);
        Action::Continue
    }
}
