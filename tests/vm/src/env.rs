//! The functions of `env`: what a guest can ask of its host, with the answers
//! that Envoy gives.
//!
//! Each takes the arguments of the ABI as an array. A pointer and a size that
//! name a place for a result end in `_at`.

use std::time::Duration;

use wasmtime::{Caller, Linker};

use crate::abi::{Fault, Guest, Outcome, Status, answer, define};
use crate::calls::{GRPC, GrpcCall, HTTP, HttpCall};
use crate::failure::Level;
use crate::headers::Headers;
use crate::host::Host;
use crate::stream::{Deferred, Direction, LocalReply};
use crate::vm::RootId;
use crate::world::MetricKind;

const MODULE: &str = "env";

pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    function(linker, "proxy_log", log)?;
    function(linker, "proxy_get_log_level", get_log_level)?;
    function(linker, "proxy_get_current_time_nanoseconds", get_current_time)?;
    function(linker, "proxy_set_tick_period_milliseconds", set_tick_period)?;
    function(linker, "proxy_set_effective_context", set_effective_context)?;
    function(linker, "proxy_done", done)?;
    function(linker, "proxy_get_status", get_status)?;
    function(linker, "proxy_call_foreign_function", call_foreign_function)?;
    function(linker, "proxy_get_property", get_property)?;
    function(linker, "proxy_set_property", set_property)?;

    function(linker, "proxy_get_shared_data", get_shared_data)?;
    function(linker, "proxy_set_shared_data", set_shared_data)?;
    function(linker, "proxy_register_shared_queue", |_, [_, _, _]| no_queues())?;
    function(linker, "proxy_resolve_shared_queue", |_, [_, _, _, _, _]| no_queues())?;
    function(linker, "proxy_dequeue_shared_queue", |_, [_, _, _]| no_queues())?;
    function(linker, "proxy_enqueue_shared_queue", |_, [_, _, _]| no_queues())?;

    function(linker, "proxy_define_metric", define_metric)?;
    function(linker, "proxy_get_metric", get_metric)?;
    linker.func_wrap(MODULE, "proxy_record_metric", |caller: Caller<'_, Host>, id: u32, value: u64| {
        let mut guest = Guest::enter(caller, "proxy_record_metric")?;
        answer(guest.host().world.record_metric(id, value).map_err(Into::into))
    })?;
    linker.func_wrap(MODULE, "proxy_increment_metric", |caller: Caller<'_, Host>, id: u32, offset: i64| {
        let mut guest = Guest::enter(caller, "proxy_increment_metric")?;
        answer(guest.host().world.increment_metric(id, offset).map_err(Into::into))
    })?;

    function(linker, "proxy_get_header_map_pairs", get_header_map_pairs)?;
    function(linker, "proxy_set_header_map_pairs", set_header_map_pairs)?;
    function(linker, "proxy_get_header_map_value", get_header_map_value)?;
    function(linker, "proxy_add_header_map_value", add_header_map_value)?;
    function(linker, "proxy_replace_header_map_value", replace_header_map_value)?;
    function(linker, "proxy_remove_header_map_value", remove_header_map_value)?;
    function(linker, "proxy_get_header_map_size", get_header_map_size)?;
    function(linker, "proxy_get_buffer_bytes", get_buffer_bytes)?;
    function(linker, "proxy_get_buffer_status", get_buffer_status)?;
    function(linker, "proxy_set_buffer_bytes", set_buffer_bytes)?;
    function(linker, "proxy_continue_stream", continue_stream)?;
    function(linker, "proxy_close_stream", close_stream)?;
    function(linker, "proxy_send_local_response", send_local_response)?;

    function(linker, "proxy_http_call", http_call)?;
    function(linker, "proxy_grpc_call", grpc_call)?;
    function(linker, "proxy_grpc_cancel", grpc_cancel)?;
    function(linker, "proxy_grpc_close", grpc_cancel)?;
    function(linker, "proxy_grpc_stream", |_, [_, _, _, _, _, _, _, _, _]| no_grpc_streams())?;
    function(linker, "proxy_grpc_send", |_, [_, _, _, _]| no_grpc_streams())
}

fn function<const N: usize>(
    linker: &mut Linker<Host>,
    name: &'static str,
    function: impl Fn(&mut Guest<'_>, [u32; N]) -> Outcome + Send + Sync + 'static,
) -> wasmtime::Result<()> {
    define(linker, (MODULE, name), move |guest, arguments| answer(function(guest, arguments)))
}

fn no_queues() -> Outcome {
    Err(Status::BadArgument.into())
}

fn no_grpc_streams() -> Outcome {
    Err(Status::Unimplemented.into())
}

fn log(guest: &mut Guest<'_>, [level, text, size]: [u32; 3]) -> Outcome {
    let level = Level::from_abi(level)?;
    let message = guest.text(text, size)?;
    guest.host().log(level, message);
    Ok(())
}

fn get_log_level(guest: &mut Guest<'_>, [level_at]: [u32; 1]) -> Outcome {
    let level = guest.host().log_level as u32;
    guest.put_u32(level_at, level)
}

fn get_current_time(guest: &mut Guest<'_>, [time_at]: [u32; 1]) -> Outcome {
    let now = guest.host().world.wall_clock().as_nanos();
    guest.put_u64(time_at, u64::try_from(now).expect("a clock before the year 2554"))
}

fn set_tick_period(guest: &mut Guest<'_>, [milliseconds]: [u32; 1]) -> Outcome {
    guest.host().set_tick_period(Duration::from_millis(milliseconds.into()));
    Ok(())
}

fn set_effective_context(guest: &mut Guest<'_>, [context]: [u32; 1]) -> Outcome {
    Ok(guest.host().set_effective_context(context)?)
}

fn done(guest: &mut Guest<'_>, []: [u32; 0]) -> Outcome {
    Ok(guest.host().done()?)
}

fn get_status(guest: &mut Guest<'_>, [code_at, text_at, size_at]: [u32; 3]) -> Outcome {
    let (code, text) = guest.host().answer.status.clone();
    guest.put_u32(code_at, code)?;
    guest.give(text.as_bytes(), text_at, size_at)
}

fn call_foreign_function(
    guest: &mut Guest<'_>,
    [name, name_size, argument, argument_size, result_at, result_size_at]: [u32; 6],
) -> Outcome {
    let name = guest.bytes(name, name_size)?;
    let argument = guest.bytes(argument, argument_size)?;
    let stream = guest.host().stream();
    match (name.as_slice(), stream) {
        (b"clear_route_cache", Some(stream)) => stream.route_cache_clears += 1,
        (b"set_envoy_filter_state", Some(stream)) => stream.filter_states.push(argument),
        (b"clear_route_cache", None) => {}
        _ => return Err(Status::NotFound.into()),
    }
    for at in [result_at, result_size_at] {
        if at != 0 {
            guest.put_u32(at, 0)?;
        }
    }
    Ok(())
}

/// A path: its parts are separated by zeros there, and by dots here.
fn path(guest: &mut Guest<'_>, path: u32, size: u32) -> Result<String, Fault> {
    Ok(guest.text(path, size)?.trim_end_matches('\0').replace('\0', "."))
}

fn get_property(guest: &mut Guest<'_>, [name, size, value_at, size_at]: [u32; 4]) -> Outcome {
    let path = path(guest, name, size)?;
    let value = guest.host().property(&path).ok_or(Status::NotFound)?;
    guest.give(&value, value_at, size_at)
}

fn set_property(guest: &mut Guest<'_>, [name, name_size, value, value_size]: [u32; 4]) -> Outcome {
    let path = path(guest, name, name_size)?;
    let value = guest.bytes(value, value_size)?;
    let stream = guest.host().stream().ok_or(Status::NotFound)?;
    stream.properties.insert(path.clone(), value.clone());
    stream.written_properties.push((path, value));
    Ok(())
}

fn get_shared_data(guest: &mut Guest<'_>, [key, key_size, value_at, size_at, cas_at]: [u32; 5]) -> Outcome {
    let key = guest.bytes(key, key_size)?;
    let (value, cas) = guest.host().world.shared_data(key).ok_or(Status::NotFound)?;
    guest.give(&value, value_at, size_at)?;
    guest.put_u32(cas_at, cas)
}

fn set_shared_data(guest: &mut Guest<'_>, [key, key_size, value, value_size, cas]: [u32; 5]) -> Outcome {
    let key = guest.bytes(key, key_size)?;
    let value = guest.bytes(value, value_size)?;
    Ok(guest.host().world.guest_set(&key, &value, cas)?)
}

fn define_metric(guest: &mut Guest<'_>, [kind, name, size, id_at]: [u32; 4]) -> Outcome {
    let kinds = [MetricKind::Counter, MetricKind::Gauge, MetricKind::Histogram];
    let kind = *kinds.get(kind as usize).ok_or(Status::BadArgument)?;
    let name = guest.text(name, size)?;
    let id = guest.host().world.define_metric(kind, name);
    guest.put_u32(id_at, id)
}

fn get_metric(guest: &mut Guest<'_>, [id, value_at]: [u32; 2]) -> Outcome {
    let value = guest.host().world.get_metric(id)?;
    guest.put_u64(value_at, value)
}

const HTTP_CALL_RESPONSE_HEADERS: u32 = 6;
const LAST_MAP: u32 = 7;

/// A map to read; `None` is one that is not there now.
fn readable(host: &mut Host, map: u32) -> Result<Option<&Headers>, Status> {
    match map {
        HTTP_CALL_RESPONSE_HEADERS => Ok(host.answer.http.as_ref().map(|(headers, _)| headers)),
        ..=LAST_MAP => Ok(host.stream().and_then(|stream| stream.readable(map as usize))),
        _ => Err(Status::BadArgument),
    }
}

fn writable(host: &mut Host, map: u32) -> Result<&mut Headers, Status> {
    host.stream().ok_or(Status::BadArgument)?.writable(map as usize)
}

fn get_header_map_pairs(guest: &mut Guest<'_>, [map, pairs_at, size_at]: [u32; 3]) -> Outcome {
    // Unlike a single value, the pairs of a map that is not there are none.
    let pairs = readable(guest.host(), map)?.map(Headers::serialise).unwrap_or_default();
    guest.give(&pairs, pairs_at, size_at)
}

fn set_header_map_pairs(guest: &mut Guest<'_>, [map, pairs, size]: [u32; 3]) -> Outcome {
    let pairs = guest.headers(pairs, size)?;
    *writable(guest.host(), map)? = pairs;
    Ok(())
}

fn get_header_map_value(guest: &mut Guest<'_>, [map, name, name_size, value_at, size_at]: [u32; 5]) -> Outcome {
    let name = guest.bytes(name, name_size)?;
    let host = guest.host();
    let logging = host.stream().is_some_and(|stream| stream.logging);
    let missing = if logging { Status::NotFound } else { Status::BadArgument };
    let headers = readable(host, map)?.ok_or(missing)?;
    let value = headers.first(&name).ok_or(Status::NotFound)?.to_vec();
    guest.give(&value, value_at, size_at)
}

fn add_header_map_value(guest: &mut Guest<'_>, [map, name, name_size, value, size]: [u32; 5]) -> Outcome {
    let (name, value) = (guest.bytes(name, name_size)?, guest.bytes(value, size)?);
    writable(guest.host(), map)?.add(&name, value);
    Ok(())
}

fn replace_header_map_value(guest: &mut Guest<'_>, [map, name, name_size, value, size]: [u32; 5]) -> Outcome {
    let (name, value) = (guest.bytes(name, name_size)?, guest.bytes(value, size)?);
    writable(guest.host(), map)?.replace(&name, value);
    Ok(())
}

fn remove_header_map_value(guest: &mut Guest<'_>, [map, name, name_size]: [u32; 3]) -> Outcome {
    let name = guest.bytes(name, name_size)?;
    writable(guest.host(), map)?.remove(&name);
    Ok(())
}

fn get_header_map_size(guest: &mut Guest<'_>, [map, size_at]: [u32; 2]) -> Outcome {
    let size = writable(guest.host(), map)?.byte_size();
    guest.put_u32(size_at, u32::try_from(size).expect("a map is far below 4 GiB"))
}

/// A buffer, as it is now.
fn buffer(host: &mut Host, buffer: u32) -> Result<Vec<u8>, Status> {
    match buffer {
        0 | 1 => Ok(host.stream().and_then(|stream| stream.chunks[buffer as usize].clone()).unwrap_or_default()),
        // Of connections, or of a foreign function: there are none.
        2 | 3 | 8 => Ok(Vec::new()),
        4 => host.answer.http.as_ref().map(|(_, body)| body.clone()).ok_or(Status::NotFound),
        5 => Ok(host.answer.grpc.clone().unwrap_or_default()),
        6 => Ok(host.vm_configuration.clone()),
        7 => host.plugin_configuration.clone().ok_or(Status::NotFound),
        _ => Err(Status::BadArgument),
    }
}

fn get_buffer_bytes(guest: &mut Guest<'_>, [id, start, length, bytes_at, size_at]: [u32; 5]) -> Outcome {
    let bytes = buffer(guest.host(), id)?;
    let start = (start as usize).min(bytes.len());
    let end = start.saturating_add(length as usize).min(bytes.len());
    guest.give(&bytes[start..end], bytes_at, size_at)
}

fn get_buffer_status(guest: &mut Guest<'_>, [id, length_at, flags_at]: [u32; 3]) -> Outcome {
    let length = buffer(guest.host(), id)?.len();
    guest.put_u32(length_at, u32::try_from(length).expect("a buffer is far below 4 GiB"))?;
    guest.put_u32(flags_at, 0)
}

fn set_buffer_bytes(guest: &mut Guest<'_>, [id, start, length, bytes, size]: [u32; 5]) -> Outcome {
    let bytes = guest.bytes(bytes, size)?;
    buffer(guest.host(), id)?;
    let chunk = guest.host().stream().and_then(|stream| stream.chunks.get_mut(id as usize)?.as_mut());
    let chunk = chunk.ok_or(Status::BadArgument)?;
    // Bytes can go before it, in its place, or after it; nowhere else.
    match (start as usize, length as usize) {
        (0, 0) => *chunk = [bytes.as_slice(), chunk].concat(),
        (0, length) if length >= chunk.len() => *chunk = bytes,
        (start, _) if start > 0 && start >= chunk.len() => chunk.extend(bytes),
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

fn continue_stream(guest: &mut Guest<'_>, [kind]: [u32; 1]) -> Outcome {
    let direction = match kind {
        0 => Direction::Request,
        1 => Direction::Response,
        2 => return Ok(()),
        3 => return Err(Status::Unimplemented.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    let host = guest.host();
    let context = host.context();
    if let Some(stream) = host.stream() {
        stream.forget_request();
        host.deferred.push_back(Deferred::Continue(context, direction));
    }
    Ok(())
}

fn close_stream(guest: &mut Guest<'_>, [kind]: [u32; 1]) -> Outcome {
    let host = guest.host();
    match kind {
        0 | 1 => host.deferred.push_back(Deferred::Reset(host.context())),
        2 | 3 => {}
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

fn send_local_response(
    guest: &mut Guest<'_>,
    [status, details, details_size, body, body_size, headers, headers_size, grpc_status]: [u32; 8],
) -> Outcome {
    let reply = LocalReply {
        status,
        details: guest.text(details, details_size)?.replace(|c: char| c.is_ascii_whitespace(), "_"),
        headers: guest.headers(headers, headers_size)?,
        body: guest.bytes(body, body_size)?,
        grpc_status: (grpc_status <= 16).then_some(grpc_status),
    };
    let host = guest.host();
    host.stop_iteration = true;
    host.deferred.push_back(Deferred::Reply(host.context(), reply));
    Ok(())
}

fn http_call(
    guest: &mut Guest<'_>,
    [cluster, cluster_size, headers, headers_size, body, body_size, trailers, trailers_size, timeout, token_at]: [u32;
        10],
) -> Outcome {
    let cluster = guest.text(cluster, cluster_size)?;
    let headers = guest.headers(headers, headers_size)?;
    let body = guest.bytes(body, body_size)?;
    let trailers = guest.headers(trailers, trailers_size)?;
    guest.put_u32(token_at, 0)?;
    let host = guest.host();
    let complete = [":path", ":method", ":authority"].iter().all(|name| headers.get(name).is_some());
    if timeout.cast_signed() < 0 || !complete || !host.world.has_cluster(&cluster) {
        return Err(Status::BadArgument.into());
    }
    let (token, root) = (host.next_token(HTTP), RootId(host.root_context()));
    let timeout = Duration::from_millis(timeout.into());
    host.http_calls.insert(token, HttpCall { token, root, cluster, headers, body, trailers, timeout });
    guest.put_u32(token_at, token)
}

fn grpc_call(
    guest: &mut Guest<'_>,
    [
        cluster,
        cluster_size,
        service,
        service_size,
        method,
        method_size,
        metadata,
        metadata_size,
        message,
        message_size,
        timeout,
        token_at,
    ]: [u32; 12],
) -> Outcome {
    let cluster = guest.text(cluster, cluster_size)?;
    let service = guest.text(service, service_size)?;
    let method = guest.text(method, method_size)?;
    let metadata = guest.headers(metadata, metadata_size)?;
    let message = guest.bytes(message, message_size)?;
    let host = guest.host();
    if !host.world.has_cluster(&cluster) {
        // It is no message that describes a service either.
        return Err(Status::ParseFailure.into());
    }
    let (token, root) = (host.next_token(GRPC), RootId(host.root_context()));
    let timeout = Duration::from_millis(timeout.into());
    let call = GrpcCall { token, root, cluster, service, method, metadata, message, timeout };
    host.grpc_calls.insert(token, call);
    guest.put_u32(token_at, token)
}

/// Closing a call cancels it, too.
fn grpc_cancel(guest: &mut Guest<'_>, [token]: [u32; 1]) -> Outcome {
    if token & 3 != GRPC {
        return Err(Status::BadArgument.into());
    }
    guest.host().grpc_calls.remove(&token).map(|_| ()).ok_or(Status::NotFound.into())
}
