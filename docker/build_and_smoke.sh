#!/usr/bin/env bash
# Builds docker/Dockerfile and runs what it made, without Docker or a GPU: for anyone who is root on a Debian machine.
#   docker/build_and_smoke.sh [FOLDER]     FOLDER (default: a new one) needs 20 GB; the log is FOLDER/log
# The base is Debian 12 by debootstrap under a local name, torch is its CPU build; all else is the real image. It is built
# by buildah; its commands run in namespaces of their own, under tini as process 1, on a read-only root, as a user without
# a name.
# A package source of your own: PIP_INDEX_URL, PIP_FIND_LINKS and PIP_CERT are used as they are set here.
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "error: $0 must be run as root: it mounts and makes namespaces" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mkdir -p "${1:-/var/tmp/svdtune-image}" && cd "${1:-/var/tmp/svdtune-image}" && pwd)
base=localhost/svdtune-base:debian-12
image=localhost/svdtune:cpu
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
root=$work/root
container='' first=''
trap cleanup EXIT
exec > >(tee "$work/log") 2>&1

say() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
fail() { printf 'FAILED: %s\n' "$*"; exit 1; }
cleanup() {
    [ -z "$first" ] || kill -KILL "$first" || true
    [ -z "$container" ] || buildah rm "$container" >/dev/null
}
buildah() { command buildah --storage-driver vfs --root "$work/store" --runroot "$work/run" "$@"; }

tools() {
    command -v buildah debootstrap >/dev/null && return
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends buildah debootstrap >/dev/null
}

make_base() {
    buildah images -q "$base" >/dev/null 2>&1 && return
    local scratch
    rm -rf "$work/debian"
    debootstrap --variant=minbase bookworm "$work/debian" "$mirror" >"$work/debootstrap.log"
    scratch=$(buildah from scratch)
    buildah copy -q "$scratch" "$work/debian" /
    buildah commit -q --rm "$scratch" "$base"
    rm -rf "$work/debian"
}

# The CPU build of torch for the Python of Debian 12, from the sources of this machine or else from PyTorch's own.
fetch_torch() {
    local version
    local wanted=(--quiet --no-deps --only-binary ":all:" --python-version 3.11 --platform manylinux_2_28_x86_64)
    version=$(sed -n 's/^torch==//p' constraints.txt)
    mkdir -p "$work/wheels"
    compgen -G "$work/wheels/torch-$version+cpu-*.whl" >/dev/null ||
        python3 -m pip download "${wanted[@]}" --dest "$work/wheels" "torch==$version+cpu" ||
        python3 -m pip download "${wanted[@]}" --dest "$work/wheels" "torch==$version+cpu" \
            --index-url https://download.pytorch.org/whl/cpu
}

build() {
    local options=(--volume "$work/wheels:/wheels:ro" --build-arg PIP_FIND_LINKS=/wheels)
    [ -z "${PIP_INDEX_URL:-}" ] || options+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL")
    [ -z "${PIP_CERT:-}" ] ||
        options+=(--volume "$PIP_CERT:/run/pip-cert.pem:ro" --build-arg PIP_CERT=/run/pip-cert.pem)
    rm -rf "$work/context" "$work"/runs-*
    mkdir "$work/context"
    cp -r pyproject.toml README.md .dockerignore configs docker svdtune "$work/context"
    python3 docker/cpu_lock.py docker/requirements.lock "$work"/wheels/torch-*.whl >"$work/context/docker/cpu.lock"
    buildah bud --quiet --isolation chroot --format docker --pull-never "${options[@]}" \
        --build-arg "CUDA_BASE=$base" --build-arg LOCK=docker/cpu.lock \
        --file docker/Dockerfile --tag "$image" "$work/context"
}

# What the image says about itself, and its files on a folder of this machine.
open_image() {
    container=$(buildah from --pull-never "$image")
    files=$(buildah mount "$container")
    mapfile -t environment < <(configured '{{range .Docker.Config.Env}}{{println .}}{{end}}')
    mapfile -t entrypoint < <(configured '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}')
    workdir=$(configured '{{.Docker.Config.WorkingDir}}')
    user=$(configured '{{.Docker.Config.User}}')
    mkdir -p "$root"
    echo 127.0.0.1 localhost container >"$files/etc/hosts" # Docker writes that one; torchrun asks for localhost
    [ "$user" = 1000:1000 ] || fail "USER is $user"
    [ "$(configured '{{.Docker.Config.StopSignal}}')" = SIGTERM ] || fail "STOPSIGNAL is not SIGTERM"
    [ -n "$(configured '{{.Docker.Config.Healthcheck}}')" ] || fail "there is no HEALTHCHECK"
    [ "${entrypoint[0]}" = /usr/bin/tini ] || fail "the entry is ${entrypoint[*]}"
}

configured() { buildah inspect --type image --format "$1" "$image" | sed '/^$/d'; }

# inside UID PROGRAM...: as `docker run --read-only --tmpfs /tmp -v .. --user UID:UID` starts it, without the entry.
inside() {
    local uid=$1
    shift
    mkdir -p "$work/runs-$uid"
    chown "$uid:$uid" "$work/runs-$uid"
    # shellcheck disable=SC2016  # the inner shell's own arguments
    exec unshare --mount --pid --uts --fork --kill-child bash -euc '
        files=$1 root=$2 runs=$3 uid=$4
        shift 4
        hostname container
        mount --bind "$files" "$root"
        mount -o remount,ro,bind "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
        mount -t tmpfs -o mode=1777 tmpfs "$root/cache"
        mount --bind "$runs" "$root/workspace/runs"
        exec setpriv --no-new-privs chroot --userspec="$uid:$uid" --groups= "$root" "$@"
    ' inside "$files" "$root" "$work/runs-$uid" "$uid" env -i "${environment[@]}" env -C "$workdir" "$@"
}

run_as() { (inside "$1" "${entrypoint[@]}" "${@:2}"); }

# expect UID WORDS COMMAND...: the command says WORDS.
expect() {
    local said
    said=$(run_as "$1" "${@:3}" 2>&1) || true
    grep -qF -- "$2" <<<"$said" || fail "${*:3} as $1: expected '$2', got: $said"
    echo "ok: ${*:3} (user $1)"
}

spellings() {
    expect 4242 "Usage: svdtune" --help
    expect 4242 "Usage: svdtune" # no argument at all
    expect 4242 "Usage: svdtune train" train --help
    expect 4242 "Usage: svdtune train" svdtune train --help
    expect 4242 "Usage: svdtune train" accelerate launch svdtune train --help
    expect 4242 "Usage: svdtune train" accelerate launch -m svdtune train --help
    expect 4242 "No such command 'trian'" trian cfg.yaml
    expect 4242 "4242" bash -c 'id -u'
    expect 4242 "Read-only file system" touch /workspace/file
    expect 4242 "libcudart.so.12" /sbin/ldconfig -p
    # A provider's ssh login: no entry, no PATH and no variable of the image.
    (inside 4242 env -i PATH=/usr/local/bin:/usr/bin:/bin svdtune --version) || fail "a login finds no svdtune"
}

# stops UID PROGRAM...: told to stop as `docker stop` does, a training saves, and the container ends with 143 in 25 s.
stops() {
    local uid=$1 name=stop-$2 runs=$work/runs-$1 started unshared code=0
    shift
    run_as "$uid" svdtune data demo runs/clips --clips 6
    inside "$uid" "${entrypoint[@]}" "$@" train configs/tiny.yaml data.root=runs/clips "run.name=$name" \
        train.batch_size=1 train.steps=100000 checkpoint.interval=100000 validation.interval=100000 &
    unshared=$!
    for _ in {1..300}; do
        ! grep -qs '"loss"' "$runs/$name/metrics.jsonl" || break
        [ -e "/proc/$unshared" ] || fail "$*: ended before it trained"
        sleep 2
    done
    first=$(pgrep -P "$unshared")
    health "$uid" "$first" "$name"
    started=$SECONDS
    kill -TERM "$first"
    wait "$unshared" || code=$?
    first=''
    [ "$code" = 143 ] || fail "$*: SIGTERM gave exit code $code, expected 143"
    [ $((SECONDS - started)) -le 25 ] || fail "$*: SIGTERM took $((SECONDS - started)) s"
    grep -q '"state": "stopped"' "$runs/$name/status.json" || fail "$*: $(cat "$runs/$name/status.json")"
    compgen -G "$runs/$name/checkpoints/step-*/MANIFEST.json" >/dev/null || fail "$*: no checkpoint was saved"
    echo "ok: SIGTERM to $* train: exit code $code after $((SECONDS - started)) s, checkpoint saved"
}

# health UID FIRST NAME: the image's health check inside the running container whose first process is FIRST.
health() {
    local said
    said=$(nsenter --target "$2" --mount --pid --uts chroot --userspec="$1:$1" "$root" env -i "${environment[@]}" \
        env -C "$workdir" /opt/svdtune/docker/healthcheck) || fail "health check: $said"
    grep -qF "runs/$3: last step" <<<"$said" || fail "health check: expected the last step of runs/$3, got: $said"
    echo "ok: health check: $said"
}

say "tools"; tools
say "base image"; make_base
say "torch"; fetch_torch
say "build"; build
say "image"; open_image
say "spellings"; spellings
for uid in 1000 4242; do
    say "smoke test as user $uid on a read-only root"
    run_as "$uid" docker/smoke.sh
done
say "stop svdtune train"; stops 1000 svdtune
say "stop accelerate launch svdtune train"; stops 4242 accelerate launch svdtune
say "image and all checks: ok"
