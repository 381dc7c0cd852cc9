# shellcheck shell=sh
# Sourced by ./ramet and ./test: sets $venv to a healthy environment for $root with the dependency group $group (or none). Milliseconds when there is one.

# shellcheck disable=SC2154  # root and group are the caller's
# The stamp is written last, so it vouches for the whole environment: made from this lock file, for this checkout, with this group.
healthy() {
    [ -x "$1/bin/python" ] && [ -r "$1/ramet-stamp" ] || return 1
    { read -r has_lock has_group && read -r has_root; } < "$1/ramet-stamp" || return 1
    [ "$has_lock" = "$lock" ] && [ "$has_root" = "$root" ] || return 1
    [ -z "$group" ] || [ "$has_group" = "$group" ] || [ "$has_group" = dev ] # dev includes the other groups
}

command -v sha256sum > /dev/null || { echo "ramet: there is no sha256sum here; Ramet runs on Linux (Debian 12 is what it is tested on)." >&2; exit 6; }
lock=$(sha256sum < "$root/uv.lock")
lock=${lock%% *}
venv=${RAMET_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
if ! healthy "$venv"; then
    # A checkout that we may not write to (another user's, read-only media) gets its environment in our cache.
    if [ -z "${RAMET_VENV:-}" ] && [ ! -w "$root" ]; then
        id=$(printf %s "$root" | sha256sum)
        venv=${XDG_CACHE_HOME:-$HOME/.cache}/ramet/venv-${id%????????????????????????????????????????????????????  -}
    fi
    healthy "$venv" || sh "$root/tools/bootstrap.sh" "$root" "$venv" "$lock" "$group" || exit
fi
