//! The functions of the proxy-wasm ABI 0.2.1 and of WASI that the module calls, behind safe functions.
//!
//! They are declared here, and not taken from the SDK, because the SDK panics on a status that it does not expect, and a
//! panic ends every stream of the worker. Here a call that fails is a value.
//!
//! This is the only file with unsafe calls. What they rest on, besides the note at each call: a pointer is valid for the
//! call, because it comes from a slice or a local that outlives it, and the host keeps no pointer after the call.

#![allow(unsafe_code)]

use proxy_wasm::types::{BufferType, LogLevel, MapType, MetricType, StreamType};

/// `proxy_status_t`; 0 is success.
type Status = u32;
const OK: Status = 0;

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_log_level(level: *mut u32) -> Status;
    fn proxy_set_tick_period_milliseconds(period: u32) -> Status;
    fn proxy_get_buffer_bytes(
        buffer: BufferType,
        start: usize,
        max: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> Status;
    fn proxy_get_header_map_pairs(map: MapType, data: *mut *mut u8, size: *mut usize) -> Status;
    fn proxy_get_header_map_value(
        map: MapType,
        name: *const u8,
        name_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
    ) -> Status;
    fn proxy_add_header_map_value(
        map: MapType,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> Status;
    fn proxy_replace_header_map_value(
        map: MapType,
        name: *const u8,
        name_size: usize,
        value: *const u8,
        value_size: usize,
    ) -> Status;
    fn proxy_remove_header_map_value(map: MapType, name: *const u8, name_size: usize) -> Status;
    fn proxy_send_local_response(
        status: u32,
        details: *const u8,
        details_size: usize,
        body: *const u8,
        body_size: usize,
        headers: *const u8,
        headers_size: usize,
        grpc_status: i32,
    ) -> Status;
    fn proxy_set_effective_context(context: u32) -> Status;
    fn proxy_continue_stream(stream: StreamType) -> Status;
    fn proxy_close_stream(stream: StreamType) -> Status;
    fn proxy_get_property(path: *const u8, path_size: usize, data: *mut *mut u8, size: *mut usize) -> Status;
    fn proxy_set_property(path: *const u8, path_size: usize, value: *const u8, value_size: usize) -> Status;
    fn proxy_get_shared_data(
        key: *const u8,
        key_size: usize,
        data: *mut *mut u8,
        size: *mut usize,
        version: *mut u32,
    ) -> Status;
    fn proxy_set_shared_data(
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
        version: u32,
    ) -> Status;
    fn proxy_define_metric(kind: MetricType, name: *const u8, name_size: usize, id: *mut u32) -> Status;
    fn proxy_increment_metric(id: u32, offset: i64) -> Status;
    fn proxy_record_metric(id: u32, value: u64) -> Status;
    fn proxy_grpc_call(
        cluster: *const u8,
        cluster_size: usize,
        service: *const u8,
        service_size: usize,
        method: *const u8,
        method_size: usize,
        metadata: *const u8,
        metadata_size: usize,
        message: *const u8,
        message_size: usize,
        timeout: u32,
        token: *mut u32,
    ) -> Status;
    fn proxy_get_status(status: *mut u32, text: *mut *mut u8, size: *mut usize) -> Status;
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u16;
    fn random_get(buffer: *mut u8, size: usize) -> u16;
    fn environ_sizes_get(count: *mut usize, size: *mut usize) -> u16;
    fn environ_get(entries: *mut *mut u8, buffer: *mut u8) -> u16;
}

/// A clock of WASI.
#[derive(Clone, Copy)]
pub(super) enum Clock {
    /// Nanoseconds since 1970.
    Realtime = 0,
    /// In Envoy one timeline for all workers.
    Monotonic = 1,
}

/// Calls a function of the host that returns bytes. `None` where it fails.
fn fetch(call: impl FnOnce(*mut *mut u8, *mut usize) -> Status) -> Option<Vec<u8>> {
    let mut data = std::ptr::null_mut();
    let mut size = 0;
    if call(&mut data, &mut size) != OK {
        return None;
    }
    if data.is_null() {
        return Some(Vec::new());
    }
    // SAFETY: on success the host has filled `size` bytes that it obtained from `proxy_on_memory_allocate`, which
    // allocates them as a boxed slice of exactly that size and gives up ownership.
    Some(unsafe { Vec::from_raw_parts(data, size, size) })
}

/// The time of a clock, in nanoseconds.
pub(super) fn clock_time(clock: Clock) -> u64 {
    let mut time = 0;
    // SAFETY: the host writes one number.
    unsafe { clock_time_get(clock as u32, 0, &mut time) };
    time
}

/// Fills `bytes` with randomness of the host. They stay as they are where it has none.
pub(super) fn random(bytes: &mut [u8]) {
    // SAFETY: the host writes no more than the length of the slice.
    unsafe { random_get(bytes.as_mut_ptr(), bytes.len()) };
}

/// The variable `name` of the proxy's environment.
pub(super) fn environment(name: &str) -> Option<Vec<u8>> {
    let (mut count, mut size) = (0, 0);
    // SAFETY: the host writes two numbers.
    if unsafe { environ_sizes_get(&mut count, &mut size) } != 0 {
        return None;
    }
    let mut entries = vec![std::ptr::null_mut(); count];
    let mut buffer = vec![0; size];
    // SAFETY: both are as large as the host has just asked for, and it writes no more.
    if unsafe { environ_get(entries.as_mut_ptr(), buffer.as_mut_ptr()) } != 0 {
        return None;
    }
    let mut variables = buffer.split(|byte| *byte == 0);
    let value = variables.find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    Some(value.to_vec())
}

/// The level that Envoy logs at.
pub(super) fn log_level() -> LogLevel {
    let mut level = LogLevel::Info as u32;
    // SAFETY: the host writes one number.
    unsafe { proxy_get_log_level(&mut level) };
    match level {
        0 => LogLevel::Trace,
        1 => LogLevel::Debug,
        2 => LogLevel::Info,
        3 => LogLevel::Warn,
        4 => LogLevel::Error,
        _ => LogLevel::Critical,
    }
}

/// Asks for a tick of the current root context every `milliseconds`; with 0 for none.
pub(super) fn set_tick_period(milliseconds: u32) {
    // SAFETY: a call without pointers.
    unsafe { proxy_set_tick_period_milliseconds(milliseconds) };
}

/// At most `max` bytes of a buffer.
pub(super) fn buffer(buffer: BufferType, max: usize) -> Option<Vec<u8>> {
    // SAFETY: `fetch` passes two locals.
    fetch(|data, size| unsafe { proxy_get_buffer_bytes(buffer, 0, max, data, size) })
}

/// All headers of a map, serialised: see [`crate::http::encode_headers`].
pub(super) fn header_block(map: MapType) -> Option<Vec<u8>> {
    // SAFETY: `fetch` passes two locals.
    fetch(|data, size| unsafe { proxy_get_header_map_pairs(map, data, size) })
}

/// The first value of a header.
pub(super) fn header(map: MapType, name: &str) -> Option<Vec<u8>> {
    // SAFETY: `name` is passed with its length, and `fetch` passes two locals.
    fetch(|data, size| unsafe { proxy_get_header_map_value(map, name.as_ptr(), name.len(), data, size) })
}

/// Adds a value to a header.
pub(super) fn add_header(map: MapType, name: &str, value: &[u8]) {
    // SAFETY: both are passed with their lengths.
    unsafe { proxy_add_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len()) };
}

/// Replaces all values of a header by one.
pub(super) fn replace_header(map: MapType, name: &str, value: &[u8]) {
    // SAFETY: both are passed with their lengths.
    unsafe { proxy_replace_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len()) };
}

/// Removes a header.
pub(super) fn remove_header(map: MapType, name: &str) {
    // SAFETY: the name is passed with its length.
    unsafe { proxy_remove_header_map_value(map, name.as_ptr(), name.len()) };
}

/// Makes the context of a stream the current one. Whether there is such a stream.
pub(super) fn select_stream(context: u32) -> bool {
    // SAFETY: a call without pointers.
    unsafe { proxy_set_effective_context(context) == OK }
}

/// Lets the request of the current stream go on.
pub(super) fn continue_request() {
    // SAFETY: a call without pointers.
    unsafe { proxy_continue_stream(StreamType::HttpRequest) };
}

/// Resets the current stream.
pub(super) fn reset_stream() {
    // SAFETY: a call without pointers.
    unsafe { proxy_close_stream(StreamType::HttpRequest) };
}

/// Answers the request of the current stream. `headers` are serialised; `grpc_status` is -1 for none.
pub(super) fn send_local_response(status: u32, details: &str, body: &[u8], headers: &[u8], grpc_status: i32) {
    // SAFETY: all three are passed with their lengths.
    unsafe {
        proxy_send_local_response(
            status,
            details.as_ptr(),
            details.len(),
            body.as_ptr(),
            body.len(),
            headers.as_ptr(),
            headers.len(),
            grpc_status,
        )
    };
}

/// The property at `path`, whose segments are separated by zero bytes.
pub(super) fn property(path: &str) -> Option<Vec<u8>> {
    // SAFETY: `path` is passed with its length, and `fetch` passes two locals.
    fetch(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
}

/// Sets a property of the current stream.
pub(super) fn set_property(path: &str, value: &[u8]) {
    // SAFETY: both are passed with their lengths.
    unsafe { proxy_set_property(path.as_ptr(), path.len(), value.as_ptr(), value.len()) };
}

/// A value of the shared data and its version.
pub(super) fn shared_data(key: &str) -> Option<(Vec<u8>, u32)> {
    let mut version = 0;
    // SAFETY: `key` is passed with its length, `fetch` passes two locals, and the host writes one number more.
    let value =
        fetch(|data, size| unsafe { proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &mut version) })?;
    Some((value, version))
}

/// Writes a value of the shared data, if its version is still `version`; 0 is any. Whether it did.
pub(super) fn set_shared_data(key: &str, value: &[u8], version: u32) -> bool {
    // SAFETY: both are passed with their lengths.
    unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), version) == OK }
}

/// A new id for the metric `name`.
pub(super) fn define_metric(kind: MetricType, name: &str) -> Option<u32> {
    let mut id = 0;
    // SAFETY: `name` is passed with its length, and the host writes one number.
    let status = unsafe { proxy_define_metric(kind, name.as_ptr(), name.len(), &mut id) };
    (status == OK).then_some(id)
}

/// Adds to a counter.
pub(super) fn increment_metric(id: u32, amount: u64) {
    // SAFETY: a call without pointers.
    unsafe { proxy_increment_metric(id, i64::try_from(amount).unwrap_or(i64::MAX)) };
}

/// Sets a gauge.
pub(super) fn record_metric(id: u32, value: u64) {
    // SAFETY: a call without pointers.
    unsafe { proxy_record_metric(id, value) };
}

/// Sends a unary gRPC call, and returns the token of its answer. `metadata` is serialised as headers are; `timeout` is in
/// milliseconds.
pub(super) fn grpc_call(
    cluster: &str,
    (service, method): (&str, &str),
    metadata: &[u8],
    message: &[u8],
    timeout: u32,
) -> Option<u32> {
    let mut token = 0;
    // SAFETY: all five are passed with their lengths, and the host writes one number.
    let status = unsafe {
        proxy_grpc_call(
            cluster.as_ptr(),
            cluster.len(),
            service.as_ptr(),
            service.len(),
            method.as_ptr(),
            method.len(),
            metadata.as_ptr(),
            metadata.len(),
            message.as_ptr(),
            message.len(),
            timeout,
            &mut token,
        )
    };
    (status == OK).then_some(token)
}

/// The text that belongs to the status of the gRPC call that has just ended.
pub(super) fn grpc_status_text() -> Option<Vec<u8>> {
    // SAFETY: `fetch` passes two locals, and the host writes one number more.
    fetch(|data, size| unsafe { proxy_get_status(&mut 0, data, size) })
}
