#!/bin/sh
# Make the Python environment of a checkout: bootstrap.sh CHECKOUT VENV LOCK-HASH GROUP
#
# Everything in it comes from uv.lock and is verified by the hashes there; uv itself by those in tools/uv.txt. The project is not built but
# named by a .pth file: a build would fetch its backend, which no lock file covers. May be interrupted at any point and run again.
set -eu

root=$1 venv=$2 lock=$3 group=$4
cache=${RAMET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ramet}
need_mb=150
[ -z "$group" ] || need_mb=450

say() { printf '%s\n' "ramet: $*" >&2; }
die() {
    say "$1"
    shift
    for line; do printf '       %s\n' "$line" >&2; done
    exit 6
}

# --- a line of progress, and what a failure means -------------------------------------------------------------------------------------

ticker=
stop_ticker() {
    [ -n "$ticker" ] || return 0
    kill "$ticker"
    wait "$ticker" || :
    printf '\r\033[K' >&2
    ticker=
}

# step TEXT COMMAND...: run it with its output in $log; on a terminal, show for how long it has run and what it said last.
step() {
    text=$1
    shift
    if [ -t 2 ]; then
        (
            n=0
            while :; do
                printf '\r\033[K  %-34s %3d s  %.34s' "$text" "$n" "$(tail -n 1 "$log" 2> /dev/null | tr -d '\000-\037')" >&2
                n=$((n + 1))
                sleep 1
            done
        ) &
        ticker=$!
    else
        say "$text"
    fi
    status=0
    "$@" > "$log" 2>&1 < /dev/null || status=$?
    stop_ticker
    [ "$status" = 0 ] || explain "$text" "$status"
}

explain() {
    tail -n 15 "$log" | sed 's/^/  | /' >&2
    if grep -qiE 'no space left|quota exceeded|os error 28' "$log"; then
        die "$1: the disk is full." "About $need_mb MB are needed in $venv and $cache." "RAMET_VENV, RAMET_CACHE and UV_CACHE_DIR may name other places."
    elif grep -qiE 'certificate.?verify|invalid peer certificate|unknownissuer' "$log"; then
        die "$1: the package index shows a certificate that this computer does not trust." \
            "Where your network has a certificate authority of its own: put its certificate into /usr/local/share/ca-certificates" \
            "and run update-ca-certificates (as root), or name a bundle that has it in PIP_CERT and SSL_CERT_FILE."
    elif grep -qiE 'dns error|name resolution|resolving|failed to (connect|fetch)|connection (refused|reset)|timed? ?out|unreachable|no matching distribution' "$log"; then
        die "$1: the package index cannot be reached." "Look at the network and at https_proxy; then run the same command again." \
            "A mirror of your own: set PIP_INDEX_URL and UV_DEFAULT_INDEX to it."
    elif grep -qiE 'hash(es)? (mismatch|do not match)|mismatch.*hash|DO NOT MATCH' "$log"; then
        die "$1: a package is not the one that was locked: its hash differs." "Somebody between you and the package index may have changed it; nothing was installed."
    elif grep -qiE 'permission denied|read-only file system' "$log"; then
        die "$1: not allowed to write." "RAMET_VENV and RAMET_CACHE may name places that you can write to."
    fi
    die "$1 failed (status $2); the end of its output is above."
}

# --- the parts ------------------------------------------------------------------------------------------------------------------------

find_python() {
    found=
    for python in ${RAMET_PYTHON:-python3 /usr/bin/python3 python3.13 python3.12 python3.11}; do
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.version_info >= (3, 11))' 2> /dev/null) || continue
        case $version in
            *True) python=$(command -v "$python") && return ;;
            *) found="$found $python (${version% *})" ;;
        esac
    done
    die "Ramet needs Python 3.11 or newer.${found:+ Found only:$found.}" \
        "Debian 12 has it: sudo apt-get install python3" "Elsewhere: RAMET_PYTHON=/path/to/python3.11 ./ramet"
}

# uv, pinned and verified: from our cache, else installed there with pip, which Debian has in a package of its own.
find_uv() {
    version=$(sed -n 's/^uv==\([0-9.]*\).*/\1/p' "$root/tools/uv.txt")
    uv=$cache/uv-$version/bin/uv
    [ ! -x "$uv" ] || return 0
    installer=$python
    if ! "$python" -m pip --version > /dev/null 2>&1; then
        if command -v uv > /dev/null; then
            uv=uv
            return
        fi
        install_pip
    fi
    rm -rf "$cache/uv-$version.new"
    step "installer of Python packages (uv)" "$installer" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --require-hashes --requirement "$root/tools/uv.txt" --target "$cache/uv-$version.new"
    rm -rf "$cache/uv-$version"
    mv "$cache/uv-$version.new" "$cache/uv-$version"
}

install_pip() {
    if ! command -v apt-get > /dev/null; then
        die "$python has no pip, and this is not Debian: install pip for it, then run the same command again."
    elif [ "$(id -u)" != 0 ]; then
        # Modules of ours that need no package know what else will be missing: one command for the administrator, not two.
        command=$(PYTHONPATH=$root/src "$python" -B -c 'from ramet import packages; print(packages.command(packages.missing()))' 2> /dev/null) || command=
        die "$python has no pip. Run this once (it needs root, for it installs Debian packages), then the same command again:" \
            "${command:-sudo apt-get install --no-install-recommends} python3-pip"
    fi
    say "$python has no pip: installing Debian's package python3-pip."
    step "Debian's package lists" apt-get -q update
    step "Debian's package python3-pip" env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends -o DPkg::Lock::Timeout=300 install python3-pip
    "$python" -m pip --version > /dev/null 2>&1 || installer=/usr/bin/python3
}

make_venv() {
    unset VIRTUAL_ENV PYTHONPATH PYTHONHOME
    export UV_PROJECT_ENVIRONMENT="$venv" UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
    if [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2> /dev/null; then
        [ -f "$venv/pyvenv.cfg" ] || die "$venv is there, but is no Python environment; not touching it." "RAMET_VENV may name another place."
        rm -rf "$venv"
    fi
    rm -f "$venv/ramet-stamp"
    nogroup=--no-dev
    [ "$group" != dev ] || nogroup=
    step "Python packages from uv.lock" "$uv" sync --project "$root" --frozen --no-install-project --compile-bytecode \
        --python "$python" ${group:+--group="$group"} $nogroup
}

# The project in the environment: its sources on the path, its command in bin.
link_project() {
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$root/src" > "$site/ramet-checkout.pth"
    cat > "$venv/bin/ramet.new" << END
#!/bin/sh
'''exec' "$venv/bin/python" -P "\$0" "\$@"
' '''
import sys

from ramet.cli import main

sys.exit(main())
END
    chmod +x "$venv/bin/ramet.new"
    mv "$venv/bin/ramet.new" "$venv/bin/ramet"
    printf '%s %s\n%s\n' "$lock" "$group" "$root" > "$venv/ramet-stamp.new"
    mv "$venv/ramet-stamp.new" "$venv/ramet-stamp"
}

main() {
    mkdir -p "$cache" "$(dirname -- "$venv")" 2> /dev/null || die "cannot make $cache: set RAMET_CACHE to a place that you can write to."
    log=$(mktemp) || die "cannot make a temporary file: is the disk full? (df -h ${TMPDIR:-/tmp})"
    trap 'stop_ticker; rm -f "$log"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # One at a time for each environment; who comes second finds it ready.
    exec 9< "$(dirname -- "$venv")"
    flock 9 2> /dev/null || :
    if [ "$(cat "$venv/ramet-stamp" 2> /dev/null)" = "$(printf '%s %s\n%s' "$lock" "$group" "$root")" ] && [ -x "$venv/bin/python" ]; then
        return
    fi
    # The host's certificates, where it has them: companies add their own.
    bundle=/etc/ssl/certs/ca-certificates.crt
    [ ! -r "$bundle" ] || export UV_SYSTEM_CERTS=1 PIP_CERT="${PIP_CERT:-$bundle}"
    start=$(date +%s)
    find_python
    find_uv
    make_venv
    link_project
    say "Python environment ready in $(($(date +%s) - start)) s: $venv"
}

main
