//! `pack IN.wasm OUT.wasm`: makes the module that ships from the one that the compiler made.
//!
//! The SDK exports every callback of the ABI. Envoy calls each one that it finds, at a cost to every request, and skips
//! those that are absent. So only the callbacks that Trimtab implements stay exported; code that nothing reaches any
//! more, names and other custom sections go, because Envoy compiles every byte at start.

use std::path::Path;
use std::process::ExitCode;

/// Callbacks that the SDK has too, and that we have under another name: the SDK's give way to them.
const RENAMED: [(&str, &str); 2] =
    [("trimtab_on_grpc_receive", "proxy_on_grpc_receive"), ("trimtab_on_grpc_close", "proxy_on_grpc_close")];

/// What the host may call: the callbacks that do something, and what the ABI asks for.
const EXPORTS: [&str; 15] = [
    "memory",
    "_initialize",
    "proxy_abi_version_0_2_1",
    "proxy_on_memory_allocate",
    "proxy_on_context_create",
    "proxy_on_vm_start",
    "proxy_on_configure",
    "proxy_on_tick",
    "proxy_on_http_call_response",
    "proxy_on_request_headers",
    "proxy_on_response_headers",
    "proxy_on_response_trailers",
    "proxy_on_grpc_receive",
    "proxy_on_grpc_close",
    "proxy_on_delete",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [input, output] = arguments.as_slice() else {
        eprintln!("usage: pack IN.wasm OUT.wasm");
        return ExitCode::from(2);
    };
    match pack(Path::new(input), Path::new(output)) {
        Ok(size) => {
            println!("{output}: {} KB", size.div_ceil(1000));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("pack: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pack(input: &Path, output: &Path) -> Result<usize, String> {
    let mut module = walrus::ModuleConfig::new()
        .generate_name_section(false)
        .generate_producers_section(false)
        .parse_file(input)
        .map_err(|error| format!("{}: {error:#}", input.display()))?;
    for (ours, name) in RENAMED {
        let theirs = module.exports.iter().find(|export| export.name == name).map(|export| export.id());
        if let Some(theirs) = theirs {
            module.exports.delete(theirs);
        }
        let found = module.exports.iter_mut().find(|export| export.name == ours);
        let export = found.ok_or_else(|| format!("{}: {ours} is not exported", input.display()))?;
        export.name = name.to_owned();
    }
    for name in EXPORTS {
        if !module.exports.iter().any(|export| export.name == name) {
            return Err(format!("{}: {name} is not exported", input.display()));
        }
    }
    let superfluous: Vec<_> = module
        .exports
        .iter()
        .filter(|export| !EXPORTS.contains(&export.name.as_str()))
        .map(|export| export.id())
        .collect();
    for export in superfluous {
        module.exports.delete(export);
    }
    let custom: Vec<_> = module.customs.iter().map(|(id, _)| id).collect();
    for section in custom {
        module.customs.delete(section);
    }
    walrus::passes::gc::run(&mut module);
    let bytes = module.emit_wasm();
    // Written whole or not at all: an Envoy may be watching the file.
    let partial = output.with_extension("partial");
    std::fs::write(&partial, &bytes)
        .and_then(|()| std::fs::rename(&partial, output))
        .map_err(|error| format!("{}: {error}", output.display()))?;
    Ok(bytes.len())
}
