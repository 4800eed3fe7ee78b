//! `image MODULE.wasm FOLDER [--artifact]`: makes an OCI image of the module that Istio's agent accepts, as an OCI layout
//! in a folder, and prints the digest of its manifest, which is what `sha256` of a WasmPlugin is compared with.
//!
//! The same module gives the same image, byte for byte, on every machine: no time, no user and no platform's own gzip
//! goes into it. What is written is the *compat* variant of the Wasm image specification, whose last layer is a gzipped
//! archive with `plugin.wasm` (what `FROM scratch` with `COPY plugin.wasm ./` makes), because every registry takes it.
//! `--artifact` writes the other one, two layers of their own media types, one of them the module as it is.

use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const ARTIFACT_CONFIG: &str = "application/vnd.module.wasm.config.v1+json";
const ARTIFACT_LAYER: &str = "application/vnd.module.wasm.content.layer.v1+wasm";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (module, folder, artifact) = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [module, folder] => (PathBuf::from(module), PathBuf::from(folder), false),
        [module, folder, "--artifact"] => (PathBuf::from(module), PathBuf::from(folder), true),
        _ => {
            eprintln!("usage: image MODULE.wasm FOLDER [--artifact]");
            return ExitCode::from(2);
        }
    };
    let written = fs::read(&module).and_then(|module| Layout::create(&folder)?.image(&module, artifact));
    match written {
        Ok(digest) => {
            println!("{digest}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("image: {} to {}: {error}", module.display(), folder.display());
            ExitCode::FAILURE
        }
    }
}

/// An OCI image layout: a folder of blobs, each named by its digest, and an index of manifests.
struct Layout<'f>(&'f Path);

impl Layout<'_> {
    fn create(folder: &Path) -> io::Result<Layout<'_>> {
        fs::create_dir_all(folder.join("blobs/sha256"))?;
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Layout(folder))
    }

    /// Adds the image; returns its digest.
    fn image(&self, module: &[u8], artifact: bool) -> io::Result<String> {
        let (config, layers) = if artifact {
            let layers = [self.blob(ARTIFACT_LAYER, module)?, self.blob(ARTIFACT_CONFIG, b"{}")?];
            (self.blob(ARTIFACT_CONFIG, b"{}")?, layers.to_vec())
        } else {
            let archive = archive(module)?;
            let config = json!({
                "architecture": "wasm", "os": "wasi", "config": {},
                "rootfs": {"type": "layers", "diff_ids": [digest(&archive)]},
            });
            (self.blob(CONFIG, config.to_string().as_bytes())?, vec![self.blob(LAYER, &gzipped(&archive)?)?])
        };
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let manifest = manifest.to_string();
        let described = self.blob(MANIFEST, manifest.as_bytes())?;
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]});
        fs::write(self.0.join("index.json"), index.to_string())?;
        Ok(digest(manifest.as_bytes()))
    }

    /// Adds a blob; returns what describes it.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> io::Result<Value> {
        let digest = digest(bytes);
        let name = digest.trim_start_matches("sha256:");
        fs::write(self.0.join("blobs/sha256").join(name), bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }
}

/// The archive that holds the module, and nothing of the machine that made it.
fn archive(module: &[u8]) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(module.len() as u64);
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_data(&mut header, "plugin.wasm", module)?;
    builder.into_inner()
}

fn gzipped(bytes: &[u8]) -> io::Result<Vec<u8>> {
    // 255: an unknown operating system.
    let mut encoder = GzBuilder::new().operating_system(255).write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    encoder.finish()
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digests of images of one module, which anybody who makes them gets.
    #[test]
    fn the_same_module_gives_the_same_image_everywhere() {
        for (artifact, expected) in [
            (false, "sha256:940d0f492f4c8689ddaf1fbd34fe415b111ae1059a5f0ac2851db089baa5fd0f"),
            (true, "sha256:ca4216be666a64db8d4d7e1a02b8a006e851e6e7a61c1a6f80967a2d8925b2aa"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let module = b"\0asm\x01\0\0\0".repeat(1000);
            let digest = Layout::create(folder.path()).unwrap().image(&module, artifact).unwrap();
            assert_eq!(digest, expected, "artifact: {artifact}");
        }
    }

    #[test]
    fn the_layer_holds_the_module() {
        let layer = gzipped(&archive(b"module").unwrap()).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layer.as_slice()));
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap().to_str(), Some("plugin.wasm"));
        let mut module = String::new();
        io::Read::read_to_string(&mut entry, &mut module).unwrap();
        assert_eq!(module, "module");
    }
}
