//! Envoy, through the proxy-wasm ABI 0.2.1: the only file that knows it.
//!
//! The SDK dispatches the callbacks. The calls to the host are declared here, because the SDK's own panic on a status
//! they do not expect, and a panic takes every stream of the worker with it; here a call that fails is a value. The
//! header map is taken as the block that the host serialises, not as a map of strings: that is the whole difference
//! in cost between this filter and one that reads single headers.
#![allow(unsafe_code)]

use super::{
    CallId, Calls, Conflict, GrpcAnswer, GrpcCall, GrpcClient, Host, MetricId, Metrics, Properties, StateStore, Version,
};
use crate::fault::{HeldStreams, Slot};
use crate::filter::{Exchange, Filter, Hold, Verdict, Waiting};
use crate::http::{HeaderMutation, LocalReply, encode_headers};
use crate::outlier::MAX_ANSWER_BYTES;
use crate::policy::Policy;
use crate::random::split_mix;
use crate::ratelimit::service::{MAX_RESPONSE_BYTES, Outcome, Waiters};
use crate::units::{Monotonic, Wall};
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, BufferType, ContextType, LogLevel, MapType, MetricType, StreamType};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

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
}

impl Default for Envoy {
    fn default() -> Self {
        let mut seed = [0; 8];
        // SAFETY: the buffer is valid for its length. Where there is no randomness the seed stays zero.
        unsafe { random_get(seed.as_mut_ptr(), seed.len()) };
        Envoy { random: Cell::new(u64::from_le_bytes(seed)) }
    }
}

// SAFETY of all calls below: every pointer comes from a live slice with its own length, or from a local that the call
// fills; the host copies and keeps none.
impl StateStore for Envoy {
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

    fn put(&self, key: &str, value: &[u8]) {
        // Version 0 is any.
        unsafe { proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), 0) };
    }
}

impl Metrics for Envoy {
    fn counter(&self, name: &str) -> MetricId {
        define(MetricType::Counter, name)
    }

    fn gauge(&self, name: &str) -> MetricId {
        define(MetricType::Gauge, name)
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

fn define(kind: MetricType, name: &str) -> MetricId {
    let mut id = u32::MAX;
    unsafe { proxy_define_metric(kind, name.as_ptr(), name.len(), &mut id) };
    MetricId(id)
}

impl Properties for Envoy {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        let path = path.join("\0");
        fetch(|data, size| unsafe { proxy_get_property(path.as_ptr(), path.len(), data, size) })
    }

    fn leave(&self, name: &str, value: &[u8]) {
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

impl Calls for Envoy {
    /// Through the SDK: it hands over only the answers to calls that it has made itself. It panics on no status that
    /// Envoy returns here.
    fn http_get(&self, cluster: &str, path: &str, timeout: u64) -> Option<u32> {
        let headers = vec![(":method", "GET"), (":path", path), (":authority", "trimtab")];
        let timeout = Duration::from_nanos(timeout);
        proxy_wasm::hostcalls::dispatch_http_call(cluster, headers, None, Vec::new(), timeout).ok()
    }
}

impl Host for Envoy {
    fn now(&self) -> Monotonic {
        let mut now = 0;
        unsafe { clock_time_get(MONOTONIC, 0, &mut now) };
        now
    }

    fn wall_now(&self) -> Wall {
        let mut now = 0;
        unsafe { clock_time_get(REALTIME, 0, &mut now) };
        now
    }

    fn random(&self) -> u64 {
        let mut state = self.random.get();
        let drawn = split_mix(&mut state);
        self.random.set(state);
        drawn
    }
}

/// What the streams of one configuration in one worker share.
///
/// Invariant: no borrow is alive while a stream is resumed or answered, because the host may then call back at once.
#[derive(Default)]
struct Worker {
    envoy: Envoy,
    filter: RefCell<Option<Filter>>,
    held: RefCell<HeldStreams<Box<Hold>>>,
    waiters: RefCell<Waiters<Paused>>,
}

/// A stream's request that waits for a call.
struct Paused {
    headers: Vec<u8>,
    waiting: Box<Waiting>,
    /// Where the stream finds its exchange in the end: the answer comes to the worker, not to the stream.
    exchange: Rc<Cell<Exchange>>,
}

thread_local! {
    /// The workers whose filter may have calls under way: the host tells of an answer by the call's token alone. One for
    /// each configuration that is in use.
    static WORKERS: RefCell<Vec<Weak<Worker>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the answer to a call, for whichever filter sent it.
fn on_grpc_answer(answer: GrpcAnswer<'_>) {
    let workers: Vec<Rc<Worker>> = WORKERS.with_borrow(|workers| workers.iter().filter_map(Weak::upgrade).collect());
    for worker in workers {
        worker.settle(answer);
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

impl Worker {
    /// Asks for the next tick: when the next held stream is due, and often enough for the filter's windows.
    fn schedule(&self) {
        const MILLISECOND: u64 = 1_000_000;
        let now = self.envoy.now();
        let due = self.held.borrow().next_due().map(|due| due.saturating_sub(now));
        let windows = self.filter.borrow().as_ref().and_then(|filter| filter.tick_period(due.is_some()));
        let period = match (due, windows) {
            (Some(due), Some(windows)) => Some(due.min(windows)),
            (due, windows) => due.or(windows),
        };
        let period = period.map_or(0, |period| period.div_ceil(MILLISECOND).max(1));
        unsafe { proxy_set_tick_period_milliseconds(u32::try_from(period).unwrap_or(u32::MAX)) };
    }

    /// Lets the streams go on that waited for a call.
    fn settle(&self, answer: GrpcAnswer<'_>) {
        let found = {
            let mut filter = self.filter.borrow_mut();
            let Some(filter) = filter.as_mut() else { return };
            let mut waiters = self.waiters.borrow_mut();
            let settled = filter.on_answer(&self.envoy, answer, waiters.count(answer.call));
            waiters.settle(answer.call, settled)
        };
        for (stream, paused, outcome) in found {
            self.go_on(stream, paused, outcome);
        }
    }

    fn go_on(&self, stream: u32, paused: Paused, outcome: Outcome) {
        let Paused { headers, waiting, exchange } = paused;
        let is_there = unsafe { proxy_set_effective_context(stream) } == OK;
        let verdict = {
            let mut filter = self.filter.borrow_mut();
            let Some(filter) = filter.as_mut() else { return };
            if !is_there {
                return filter.on_gone(&self.envoy, *waiting);
            }
            let may_hold = self.held.borrow().has_room();
            let decision = filter.on_settled(&self.envoy, &headers, may_hold, waiting, outcome);
            mutate_all(&decision.mutations);
            exchange.set(decision.exchange);
            decision.verdict
        };
        match verdict {
            Verdict::Continue => {
                unsafe { proxy_continue_stream(StreamType::HttpRequest) };
            }
            Verdict::Answer(reply) => answer(&reply),
            Verdict::Reset => reset(),
            Verdict::Delay(hold) => self.hold(stream, hold),
            Verdict::Wait(waiting) => self.wait(stream, Paused { headers, waiting, exchange }),
        }
    }

    fn hold(&self, stream: u32, hold: Box<Hold>) {
        let until = self.envoy.now().saturating_add(hold.delay);
        self.held.borrow_mut().hold(stream, until, hold);
        self.schedule();
    }

    fn wait(&self, stream: u32, paused: Paused) {
        self.waiters.borrow_mut().wait(paused.waiting.call, stream, paused);
    }

    /// Lets go of every stream that is to be let go now.
    fn release(&self) {
        let released = match self.filter.borrow_mut().as_mut() {
            Some(filter) => filter.release(&mut self.held.borrow_mut(), &self.envoy),
            None => Vec::new(),
        };
        for (stream, hold) in released {
            self.let_go(stream, *hold);
        }
    }

    /// Does what follows a delay.
    fn let_go(&self, stream: u32, hold: Hold) {
        if unsafe { proxy_set_effective_context(stream) } == OK {
            match hold.then {
                Verdict::Answer(reply) => answer(&reply),
                Verdict::Reset => reset(),
                Verdict::Continue | Verdict::Delay(_) | Verdict::Wait(_) => {
                    unsafe { proxy_continue_stream(StreamType::HttpRequest) };
                }
            }
        }
        self.free(hold.slot);
    }

    /// Gives back the slot of a fault that is over.
    fn free(&self, slot: Option<Slot>) {
        if let (Some(slot), Some(filter)) = (slot, self.filter.borrow().as_ref()) {
            filter.free(slot, &self.envoy);
        }
    }
}

/// The plugin: one for each configuration and worker.
#[derive(Default)]
struct Root {
    worker: Rc<Worker>,
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
        if let Some(filter) = self.worker.filter.borrow_mut().as_mut() {
            filter.on_call_answered(&self.worker.envoy, call, status, body.as_deref());
        }
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
                    WORKERS.with_borrow_mut(|workers| {
                        workers.retain(|worker| worker.strong_count() > 0);
                        workers.push(Rc::downgrade(&self.worker));
                    });
                }
                *self.worker.filter.borrow_mut() = Some(Filter::new(policy, &self.worker.envoy));
                self.worker.schedule();
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
        if let Some(filter) = self.worker.filter.borrow_mut().as_mut() {
            filter.on_tick(&self.worker.envoy);
        }
        self.worker.release();
        self.worker.schedule();
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        let (worker, exchange) = (Rc::clone(&self.worker), Exchange::default());
        Some(Box::new(Stream { id, worker, exchange, waited: None, is_held: false }))
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

/// One request.
struct Stream {
    id: u32,
    worker: Rc<Worker>,
    exchange: Exchange,
    /// The exchange of a request that has waited.
    waited: Option<Rc<Cell<Exchange>>>,
    /// Whether it may be held or wait.
    is_held: bool,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        let worker = &*self.worker;
        let headers;
        let verdict = {
            let mut filter = worker.filter.borrow_mut();
            let Some(filter) = filter.as_mut() else { return Action::Continue };
            headers =
                fetch(|data, size| unsafe { proxy_get_header_map_pairs(MapType::HttpRequestHeaders, data, size) })
                    .unwrap_or_default();
            let may_hold = worker.held.borrow().has_room();
            let decision = filter.on_request(&worker.envoy, &headers, !end_of_stream, may_hold);
            mutate_all(&decision.mutations);
            self.exchange = decision.exchange;
            decision.verdict
        };
        match verdict {
            Verdict::Continue => return Action::Continue,
            Verdict::Answer(reply) => answer(&reply),
            Verdict::Reset => reset(),
            Verdict::Delay(hold) => {
                self.is_held = true;
                worker.hold(self.id, hold);
            }
            Verdict::Wait(waiting) => {
                self.is_held = true;
                let exchange = Rc::<Cell<Exchange>>::default();
                self.waited = Some(Rc::clone(&exchange));
                worker.wait(self.id, Paused { headers, waiting, exchange });
            }
        }
        Action::Pause
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        if let Some(exchange) = self.waited.take() {
            self.exchange = exchange.take();
        }
        if let Some(filter) = self.worker.filter.borrow_mut().as_mut() {
            let header = |name: &str| header(MapType::HttpResponseHeaders, name);
            let mut change = |mutation| mutate(MapType::HttpResponseHeaders, &mutation);
            filter.on_response(&self.worker.envoy, &mut self.exchange, &header, &mut change);
        }
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        if let Some(filter) = self.worker.filter.borrow_mut().as_mut() {
            let header = |name: &str| header(MapType::HttpResponseTrailers, name);
            let mut change = |mutation| mutate(MapType::HttpResponseTrailers, &mutation);
            filter.on_response_trailers(&self.worker.envoy, &mut self.exchange, &header, &mut change);
        }
        Action::Continue
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_held {
            let hold = self.worker.held.borrow_mut().forget(self.id);
            self.worker.free(hold.and_then(|hold| hold.slot));
            let paused = self.worker.waiters.borrow_mut().forget(self.id);
            if let (Some(paused), Some(filter)) = (paused, self.worker.filter.borrow_mut().as_mut()) {
                filter.on_gone(&self.worker.envoy, *paused.waiting);
            }
        }
        let slot = self.waited.as_ref().map_or(self.exchange.slot, |waited| waited.take().slot);
        self.worker.free(slot);
    }
}

#[inline(never)]
fn mutate_all(mutations: &[HeaderMutation<'_>]) {
    for mutation in mutations {
        mutate(MapType::HttpRequestHeaders, mutation);
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
