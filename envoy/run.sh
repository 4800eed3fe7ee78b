#!/bin/sh
# Runs envoy.yaml on this machine, between two upstreams, until interrupted:
# by func-e where it is there, directly otherwise.
#
# Usage: envoy/run.sh [module.wasm]    (default: target/wasm/trimtab.wasm)
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
module=${1:-$root/target/wasm/trimtab.wasm}
envoy=${ENVOY:-$root/.cache/envoy/1.40.0/envoy}
func_e=$root/.cache/bin/func-e

fail() { printf 'run: %s\n' "$*" >&2; exit 1; }
[ -f "$module" ] || fail "there is no module at $module: run make build"
[ -x "$envoy" ] || fail "there is no Envoy at $envoy: run envoy/setup.sh"
module=$(CDPATH='' cd -- "$(dirname -- "$module")" && pwd)/$(basename -- "$module")

scratch=$(mktemp -d)
upstreams='' proxy=''
stop() {
    trap - EXIT
    trap '' INT TERM HUP
    # shellcheck disable=SC2086 # none, one or two process ids
    [ -z "$upstreams$proxy" ] || kill $upstreams $proxy 2>/dev/null || :
    wait
    rm -rf -- "$scratch"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# On one machine the upstreams' names are loopback, and nobody else's business.
sed -e "s|/etc/trimtab/trimtab.wasm|$module|" \
    -e 's/address: v[12],/address: 127.0.0.1,/' \
    -e 's/address: 0\.0\.0\.0,/address: 127.0.0.1,/' "$root/envoy/envoy.yaml" >"$scratch/envoy.yaml"
sed -e 's/address: 0\.0\.0\.0,/address: 127.0.0.1,/' "$root/envoy/upstreams.yaml" >"$scratch/upstreams.yaml"

"$envoy" --config-path "$scratch/upstreams.yaml" --disable-hot-restart --log-level warning &
upstreams=$!
if [ -x "$func_e" ]; then
    ENVOY_PATH=$envoy FUNC_E_HOME=$scratch FUNC_E_RUNTIME_DIR=$scratch \
        "$func_e" run --config-path "$scratch/envoy.yaml" --disable-hot-restart &
else
    "$envoy" --config-path "$scratch/envoy.yaml" --disable-hot-restart &
fi
proxy=$!
printf 'run: http://localhost:10000 (admin: http://localhost:9901); end it with Ctrl-C\n'
wait "$proxy"
