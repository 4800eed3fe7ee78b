#!/bin/sh
# Builds what the tests of this folder run, into .cache/istio/bin, through the
# Go module proxy, once for each version of this file and of istio/tools/:
#
#   istioctl, pilot-discovery (istiod), pilot-agent   Istio
#   etcd, kube-apiserver, kubectl   Kubernetes, as far as Istio talks to it
#   crdcheck   what an API server says of Istio's resources, without one
#   crane      pushes images, and serves a registry
#
# The first time takes minutes of all cores and gigabytes of Go's caches. Where
# there is no Go, nothing is built, and that is said.
#
# Usage: istio/setup.sh
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
place=$root/.cache/istio

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# The mark is written last: what is there with its mark is whole.
mark=$place/built-from
wanted() { cat -- "$root/istio/setup.sh" "$root/istio/tools/go.mod" "$root"/istio/tools/*/main.go; }
if [ -e "$mark" ] && wanted | cmp -s -- - "$mark"; then exit 0; fi

if ! command -v go >/dev/null 2>&1; then
    say 'Istio: skipped, no Go toolchain; the manifests are not validated and nothing is delivered'
    exit 0
fi

mkdir -p -- "$place"
scratch=$(mktemp -d "$place/setup.XXXXXX")
trap 'rm -rf -- "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The versions are those of go.mod; what they hold is checked against Go's
# checksum database. The builder's GOFLAGS count too: -p=1 for one.
cp -R -- "$root/istio/tools/." "$scratch"
cd -- "$scratch"
export CGO_ENABLED=0
say 'building Istio, Kubernetes and their tools: minutes, once'
GOBIN=$scratch/bin go install -mod=mod -trimpath -buildvcs=false -ldflags '-s -w' ./crdcheck tool ||
    fail 'go could not build them; the words above are its own'
mv -- bin/server bin/etcd
istio=$(go list -mod=mod -m -f '{{.Dir}}' istio.io/istio)
cp -- "$istio/manifests/charts/base/files/crd-all.gen.yaml" bin/crds.yaml
cp -- "$istio/tools/packaging/common/envoy_bootstrap.json" bin/envoy_bootstrap.json
chmod u+w bin/crds.yaml bin/envoy_bootstrap.json
# The key that the API server of the tests signs its tokens with.
(cd bin && go run "$(go env GOROOT)/src/crypto/tls/generate_cert.go" --host 127.0.0.1 --ecdsa-curve P256 >/dev/null 2>&1)

rm -rf -- "$place/bin" "$mark"
mv -- bin "$place/bin"
wanted >"$mark"
say "built $(cd -- "$place/bin" && echo *) in ${place#"$root"/}/bin"
