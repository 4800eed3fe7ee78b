#!/bin/sh
# Pushes target/image, which `make image` made, and writes where it is into
# istio/components/image.
#
# Usage: istio/push.sh registry.example/team
#
# crane pushes: the one on the PATH, or the one that istio/setup.sh built; it
# finds credentials where docker login leaves them.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
registry=${1:-}
[ -n "$registry" ] || { echo 'usage: make push REGISTRY=registry.example/team' >&2; exit 2; }

crane=$(command -v crane || echo "$root/.cache/istio/bin/crane")
[ -x "$crane" ] || { echo 'push: no crane: run istio/setup.sh (or push target/image, an OCI layout, with any other tool)' >&2; exit 1; }

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -n 1)
image=$registry/trimtab:$version
pushed=$("$crane" push "$root/target/image" "$image")
digest=${pushed##*@sha256:}

component=$root/istio/components/image/kustomization.yaml
sed -e "s#path: /spec/url, value: .*#path: /spec/url, value: \"oci://$image\"}#" \
    -e "s#path: /spec/sha256, value: .*#path: /spec/sha256, value: \"$digest\"}#" \
    "$component" >"$component.partial"
mv -f -- "$component.partial" "$component"
printf 'oci://%s\nsha256: %s\n' "$image" "$digest"
