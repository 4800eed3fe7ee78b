//! Envoy, through the proxy-wasm ABI 0.2.1: the only file that knows it.
//!
//! The SDK dispatches the callbacks. The calls to the host are declared here, because the SDK's own panic on a status
//! they do not expect, and a panic takes every stream of the worker with it; here a call that fails is a value. The
//! header map is taken as the block that the host serialises, not as a map of strings: that is the whole difference
//! in cost between this filter and one that reads single headers.
#![allow(unsafe_code)]

use super::metric_buffer::MetricBuffer;
use super::{
    CallId, Conflict, GrpcAnswer, GrpcCall, GrpcClient, Host, HttpClient, MetricId, Metrics, Properties, SharedData,
    Version,
};
use crate::http::{HeaderMutation, LocalReply, encode_headers};
use crate::outlier::MAX_ANSWER_BYTES;
use crate::policy::Policy;
use crate::random::split_mix;
use crate::ratelimit::service::MAX_RESPONSE_BYTES;
use crate::shared_data::SharedDataProblem;
use crate::units::{MonotonicInstant, UnixNanos};
use crate::worker::{self, Worker};
use hashbrown::HashMap;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, BufferType, ContextType, LogLevel, MapType, MetricType, StreamType};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;
use xxhash_rust::xxh64::xxh64;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

/// `proxy_status_t` of the ABI: 0 is success.
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
    fn proxy_get_metric(id: u32, value: *mut u64) -> Status;
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

/// WASI's wall clock.
const REALTIME: u32 = 0;

/// WASI's monotonic clock, which in Envoy is one timeline for all workers.
const MONOTONIC: u32 = 1;

/// Calls a function of the host that hands over bytes. `None` where it fails or there is nothing.
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

fn header(map: MapType, name: &str) -> Option<Vec<u8>> {
    // SAFETY: the pointers are valid for the call, and the host keeps none of them.
    fetch(|data, size| unsafe { proxy_get_header_map_value(map, name.as_ptr(), name.len(), data, size) })
}

/// The variable `name` of the proxy's environment.
fn environment(name: &str) -> Option<Vec<u8>> {
    let (mut count, mut size) = (0, 0);
    if unsafe { environ_sizes_get(&mut count, &mut size) } != 0 {
        return None;
    }
    let mut entries = vec![std::ptr::null_mut(); count];
    let mut buffer = vec![0; size];
    // SAFETY: both are as large as the host has just asked for, and it fills nothing but them.
    if unsafe { environ_get(entries.as_mut_ptr(), buffer.as_mut_ptr()) } != 0 {
        return None;
    }
    let mut variables = buffer.split(|byte| *byte == 0);
    let value = variables.find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    Some(value.to_vec())
}

/// Envoy as a [`Host`].
#[derive(Debug)]
struct Envoy {
    random: Cell<u64>,
    metrics: MetricBuffer,
    garbage: Cell<u64>,
    contended: Cell<u64>,
}

impl Default for Envoy {
    fn default() -> Self {
        let mut seed = [0; 8];
        // SAFETY: the buffer is valid for its length. Where there is no randomness the seed stays zero.
        unsafe { random_get(seed.as_mut_ptr(), seed.len()) };
        let random = Cell::new(u64::from_le_bytes(seed));
        Envoy { random, metrics: MetricBuffer::default(), garbage: Cell::new(0), contended: Cell::new(0) }
    }
}

// SAFETY of all calls below: every pointer comes from a live slice with its own length, or from a local that the call
// fills; the host copies and keeps none.
impl SharedData for Envoy {
    fn get(&self, key: &str) -> Option<(Vec<u8>, Version)> {
        let mut version = 0;
        let value =
            fetch(|data, size| unsafe { proxy_get_shared_data(key.as_ptr(), key.len(), data, size, &mut version) })?;
        Some((value, Version(version)))
    }

    fn set(&self, key: &str, value: &[u8], expected: Version) -> Result<(), Conflict> {
        match unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), expected.0) } {
            OK => Ok(()),
            _ => Err(Conflict),
        }
    }

    fn overwrite(&self, key: &str, value: &[u8]) {
        // Version 0 is any.
        unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), 0) };
    }

    fn report(&self, problem: SharedDataProblem) {
        let counted = match problem {
            SharedDataProblem::Garbage => &self.garbage,
            SharedDataProblem::Contended => &self.contended,
        };
        counted.set(counted.get().saturating_add(1));
    }
}

impl Metrics for Envoy {
    fn counter(&self, name: &str) -> MetricId {
        MetricId(define(MetricType::Counter, name))
    }

    fn gauge(&self, name: &str) -> MetricId {
        MetricId(define(MetricType::Gauge, name))
    }

    fn add(&self, metric: MetricId, amount: u64) {
        unsafe { proxy_increment_metric(metric.0, i64::try_from(amount).unwrap_or(i64::MAX)) };
    }

    fn set_gauge(&self, metric: MetricId, value: u64) {
        unsafe { proxy_record_metric(metric.0, value) };
    }

    fn value(&self, metric: MetricId) -> u64 {
        let mut value = 0;
        unsafe { proxy_get_metric(metric.0, &mut value) };
        value
    }
}

thread_local! {
    /// The host's ids of the metrics that were defined in this virtual machine, by the hash of the name. Envoy makes a
    /// new id, which it never frees, each time that a metric is defined.
    static METRICS: RefCell<HashMap<u64, u32>> = RefCell::default();
}

fn define(kind: MetricType, name: &str) -> u32 {
    let hash = xxh64(name.as_bytes(), kind as u64);
    if let Some(known) = METRICS.with_borrow(|metrics| metrics.get(&hash).copied()) {
        return known;
    }
    let mut id = u32::MAX;
    if unsafe { proxy_define_metric(kind, name.as_ptr(), name.len(), &mut id) } == OK {
        METRICS.with_borrow_mut(|metrics| metrics.insert(hash, id));
    }
    id
}

impl Properties for Envoy {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        let path = path.join("\0");
        fetch(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
    }

    fn set_property(&self, name: &str, value: &[u8]) {
        unsafe { proxy_set_property(name.as_ptr(), name.len(), value.as_ptr(), value.len()) };
    }
}

impl GrpcClient for Envoy {
    fn call(&self, call: &GrpcCall<'_>) -> Option<CallId> {
        let GrpcCall { cluster, service, method, message, timeout } = *call;
        let metadata = encode_headers::<&str, &str>(&[]);
        let mut token = 0;
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
        (status == OK).then_some(CallId(token))
    }
}

impl HttpClient for Envoy {
    /// Through the SDK: it hands over only the answers to calls that it has made itself. It panics on no status that
    /// Envoy returns here.
    fn http_get(&self, cluster: &str, path: &str, timeout: u64) -> Option<u32> {
        let headers = vec![(":method", "GET"), (":path", path), (":authority", "trimtab")];
        let timeout = Duration::from_nanos(timeout);
        proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, None, Vec::new(), timeout).ok()
    }
}

impl Host for Envoy {
    fn now(&self) -> MonotonicInstant {
        let mut now = 0;
        unsafe { clock_time_get(MONOTONIC, 0, &mut now) };
        MonotonicInstant::from_nanos(now)
    }

    fn wall_now(&self) -> UnixNanos {
        let mut now = 0;
        unsafe { clock_time_get(REALTIME, 0, &mut now) };
        UnixNanos::from_nanos(now)
    }

    fn random(&self) -> u64 {
        let mut state = self.random.get();
        let drawn = split_mix(&mut state);
        self.random.set(state);
        drawn
    }

    fn secret_bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        // SAFETY: the buffer is valid for its length.
        unsafe { random_get(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    fn has_unpublished(&self) -> bool {
        !self.metrics.is_empty() || self.garbage.get() > 0 || self.contended.get() > 0
    }

    fn publish(&self) {
        self.metrics.publish(|id, amount| unsafe {
            proxy_increment_metric(id, i64::try_from(amount).unwrap_or(i64::MAX));
        });
    }

    fn take_problems(&self) -> Vec<(SharedDataProblem, u64)> {
        let problems = [(SharedDataProblem::Garbage, &self.garbage), (SharedDataProblem::Contended, &self.contended)];
        problems.into_iter().map(|(problem, count)| (problem, count.take())).filter(|(_, count)| *count > 0).collect()
    }
}

/// One configuration in one worker thread.
///
/// Invariant: no borrow is alive while a stream is released, because the host may then call back at once.
#[derive(Default)]
struct Plugin {
    envoy: Envoy,
    /// `None` until a policy is accepted.
    worker: RefCell<Option<Worker>>,
    /// For when the next tick was asked for.
    armed: Cell<Option<MonotonicInstant>>,
}

/// Envoy's streams, as a worker releases them. Envoy carries out what is asked for after the callback.
struct EnvoyStreams;

impl worker::Streams for EnvoyStreams {
    fn select(&mut self, stream: u32) -> bool {
        unsafe { proxy_set_effective_context(stream) == OK }
    }

    fn connection(&mut self) -> Option<u64> {
        let path = "connection\0id";
        let id = fetch(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })?;
        Some(u64::from_le_bytes(id.try_into().ok()?))
    }

    fn mutate(&mut self, mutation: &HeaderMutation<'_>) {
        mutate(MapType::HttpRequestHeaders, mutation);
    }

    fn release(&mut self, _: u32, action: worker::Action) {
        match action {
            worker::Action::Continue => unsafe {
                proxy_continue_stream(StreamType::HttpRequest);
            },
            worker::Action::Reply(reply) => answer(&reply),
            worker::Action::Reset => reset(),
            worker::Action::Pause => {}
        }
    }
}

thread_local! {
    /// The plugins that may have gRPC calls under way, one for each configuration that is in use: the host names a call
    /// that is answered by its token alone.
    static PLUGINS: RefCell<Vec<Weak<Plugin>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the answer to a call, for whichever plugin sent it.
fn on_grpc_answer(answer: GrpcAnswer<'_>) {
    let plugins: Vec<Rc<Plugin>> = PLUGINS.with_borrow(|plugins| plugins.iter().filter_map(Weak::upgrade).collect());
    for plugin in plugins {
        plugin.with_worker(|worker, envoy| worker.on_grpc_answer(envoy, answer, &mut EnvoyStreams));
        plugin.arm();
    }
}

/// The message that answers a call. Not the SDK's callback: that one hands an answer to the stream that sent the call,
/// which may be gone while others wait for it. `pack` gives this one its name in the ABI.
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_receive(_root: u32, token: u32, size: usize) {
    // What is longer is cut, and what was cut cannot be read.
    let size = size.min(MAX_RESPONSE_BYTES);
    let message =
        fetch(|data, length| unsafe { proxy_get_buffer_bytes(BufferType::GrpcReceiveBuffer, 0, size, data, length) });
    on_grpc_answer(GrpcAnswer { call: CallId(token), status: 0, message: &message.unwrap_or_default() });
}

/// The end of a call that was not answered, with its gRPC status, which is not 0.
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_close(_root: u32, token: u32, status: u32) {
    let text = fetch(|data, size| unsafe { proxy_get_status(&mut 0, data, size) });
    on_grpc_answer(GrpcAnswer { call: CallId(token), status, message: &text.unwrap_or_default() });
}

impl Plugin {
    /// Calls `action` with the worker, where there is one.
    fn with_worker<R>(&self, action: impl FnOnce(&mut Worker, &Envoy) -> R) -> Option<R> {
        self.worker.borrow_mut().as_mut().map(|worker| action(worker, &self.envoy))
    }

    /// Asks for the next tick, if it is to come earlier than the one that was asked for.
    fn arm(&self) {
        const MILLISECOND: u64 = 1_000_000;
        let Some(Some(due)) = self.with_worker(|worker, envoy| worker.next_tick(envoy)) else { return };
        if self.armed.get().is_none_or(|armed| due < armed) {
            self.armed.set(Some(due));
            let period = due.saturating_since(self.envoy.now()).div_ceil(MILLISECOND).max(1);
            unsafe { proxy_set_tick_period_milliseconds(u32::try_from(period).unwrap_or(u32::MAX)) };
        }
    }
}

/// The root context: one for each configuration and worker thread.
#[derive(Default)]
struct Root {
    plugin: Rc<Plugin>,
}

impl Drop for Root {
    /// Envoy deletes the root context after the last stream of its configuration has ended. This is not in `on_done`,
    /// because Envoy would call that callback for each stream, too.
    fn drop(&mut self) {
        self.plugin.with_worker(|worker, envoy| worker.on_shutdown(envoy));
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, call: u32, _: usize, size: usize, _: usize) {
        let body = || {
            fetch(|data, length| unsafe {
                proxy_get_buffer_bytes(BufferType::HttpCallResponseBody, 0, size, data, length)
            })
        };
        let status = header(MapType::HttpCallResponseHeaders, ":status");
        let body = if size <= MAX_ANSWER_BYTES { Some(body().unwrap_or_default()) } else { None };
        self.plugin.with_worker(|worker, envoy| worker.on_http_answer(envoy, call, status, body.as_deref()));
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        adopt_log_level();
        let text = fetch(|data, length| unsafe {
            proxy_get_buffer_bytes(BufferType::PluginConfiguration, 0, size, data, length)
        });
        match Policy::from_json(&text.unwrap_or_default(), &environment) {
            Ok((policy, warnings)) => {
                for warning in warnings {
                    log::warn!("policy {}: {warning}", policy.name);
                }
                log::info!("policy {} is loaded: {} routes", policy.name, policy.routes.len());
                if policy.has_services() {
                    PLUGINS.with_borrow_mut(|plugins| {
                        plugins.retain(|plugin| plugin.strong_count() > 0);
                        plugins.push(Rc::downgrade(&self.plugin));
                    });
                }
                *self.plugin.worker.borrow_mut() = Some(Worker::new(policy, &self.plugin.envoy));
                self.plugin.arm();
                true
            }
            Err(diagnostics) => {
                for diagnostic in diagnostics {
                    log::error!("policy refused: {diagnostic}");
                }
                false
            }
        }
    }

    fn on_tick(&mut self) {
        // The host repeats the tick with the period that was set last.
        self.plugin.armed.set(None);
        self.plugin.with_worker(|worker, envoy| worker.on_tick(envoy, &mut EnvoyStreams));
        self.plugin.arm();
        if self.plugin.armed.get().is_none() {
            unsafe { proxy_set_tick_period_milliseconds(0) };
        }
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { plugin: Rc::clone(&self.plugin), stream: worker::Stream::new(id) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// Nothing is formatted that Envoy would not print.
fn adopt_log_level() {
    let mut level = LogLevel::Info as u32;
    unsafe { proxy_get_log_level(&mut level) };
    proxy_wasm::set_log_level(match level {
        0 => LogLevel::Trace,
        1 => LogLevel::Debug,
        2 => LogLevel::Info,
        3 => LogLevel::Warn,
        4 => LogLevel::Error,
        _ => LogLevel::Critical,
    });
}

/// The context of one stream.
struct Stream {
    plugin: Rc<Plugin>,
    stream: worker::Stream,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        let headers =
            fetch(|data, size| unsafe { proxy_get_header_map_pairs(MapType::HttpRequestHeaders, data, size) });
        let (plugin, stream) = (&*self.plugin, &mut self.stream);
        let mutate = |mutation: &HeaderMutation<'_>| mutate(MapType::HttpRequestHeaders, mutation);
        let action = plugin.with_worker(|worker, envoy| {
            worker.on_request(envoy, stream, headers.unwrap_or_default(), !end_of_stream, mutate, |_| {})
        });
        if plugin.armed.get().is_none() || action == Some(worker::Action::Pause) {
            plugin.arm();
        }
        match action {
            None | Some(worker::Action::Continue) => return Action::Continue,
            Some(worker::Action::Pause) => {}
            Some(worker::Action::Reply(reply)) => answer(&reply),
            Some(worker::Action::Reset) => reset(),
        }
        Action::Pause
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        let stream = &mut self.stream;
        let header = |name: &str| header(MapType::HttpResponseHeaders, name);
        let mut change = |mutation| mutate(MapType::HttpResponseHeaders, &mutation);
        self.plugin.with_worker(|worker, envoy| worker.on_response(envoy, stream, &header, &mut change));
        if self.plugin.armed.get().is_none() {
            self.plugin.arm();
        }
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        let stream = &mut self.stream;
        let header = |name: &str| header(MapType::HttpResponseTrailers, name);
        let mut change = |mutation| mutate(MapType::HttpResponseTrailers, &mutation);
        self.plugin.with_worker(|worker, envoy| worker.on_response_trailers(envoy, stream, &header, &mut change));
        Action::Continue
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let stream = &mut self.stream;
        self.plugin.with_worker(|worker, envoy| worker.on_end(envoy, stream));
    }
}

fn mutate(map: MapType, mutation: &HeaderMutation<'_>) {
    match mutation {
        HeaderMutation::Add(name, value) => unsafe {
            proxy_add_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len())
        },
        HeaderMutation::Set(name, value) => unsafe {
            proxy_replace_header_map_value(map, name.as_ptr(), name.len(), value.as_ptr(), value.len())
        },
        HeaderMutation::Remove(name) => unsafe { proxy_remove_header_map_value(map, name.as_ptr(), name.len()) },
    };
}

fn reset() {
    unsafe { proxy_close_stream(StreamType::HttpRequest) };
}

#[inline(never)]
fn answer(reply: &LocalReply) {
    let headers: Vec<(&str, &str)> = reply.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    let headers = encode_headers(&headers);
    unsafe {
        proxy_send_local_response(
            u32::from(reply.status),
            reply.details.as_ptr(),
            reply.details.len(),
            reply.body.as_ptr(),
            reply.body.len(),
            headers.as_ptr(),
            headers.len(),
            reply.grpc_status.map_or(-1, i32::from),
        )
    };
}
