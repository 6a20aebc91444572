#!/usr/bin/env bash
# Builds the image for CPUs without a Docker daemon, and shows that its container quantizes the sample and embeds a text. Builds
# the router's too, and starts it once.
# usage: sudo deploy/docker/try.sh [FOLDER]       from anywhere; works in FOLDER (default build/image), 12 GB, several minutes
#   BASE   an image or a folder with Debian 12 to build on  [default: one that debootstrap makes in FOLDER, from this machine's mirror]
# Needs root, and from Debian: buildah, debootstrap, util-linux, iproute2. pip in the build uses what pip on this machine uses.
# The container is run as an engine would with: --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges
# --network none, as user 10001, in namespaces of its own; entrypoint, command, user, environment and check are the image's.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(realpath -m "${1:-build/image}")
mkdir -p "$work"

step() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
build() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
told() { build inspect --type image --format "$1" localhost/qembed:cpu; }
each() { told "{{range $1}}{{println .}}{{end}}" | sed '/^$/d'; }

ended() {
  [ -z "${server:-}" ] || kill -KILL "$server" 2> /dev/null || true
  [ -z "${container:-}" ] || build rm "$container" > /dev/null || true
}
trap ended EXIT

base=${BASE:-$work/debian}
if [ -z "${BASE:-}" ] && [ ! -e "$base/etc/debian_version" ]; then
  step "debootstrap: Debian 12"
  # shellcheck disable=SC2016
  mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Component: main' | grep -v security | head -1)
  debootstrap --variant=minbase --include=ca-certificates bookworm "$base" "$mirror" > "$work/debootstrap.log"
fi
if [ -d "$base" ]; then
  scratch=$(build from scratch)
  build add --quiet "$scratch" "$base" / > /dev/null
  build commit --quiet --rm "$scratch" localhost/debian > /dev/null
  base=localhost/debian
fi

step "buildah build --target cpu"
# pip in the build reaches its packages as this machine's pip does: the settings that say how, and the folders that they name.
# The others stay here: a constraint file, for instance, is no file of the image's, whose versions are pinned in any case.
reach='cert|client-cert|default-timeout|extra-index-url|find-links|index-url|no-index|proxy|retries|timeout|trusted-host'
(echo '[global]'; python3 -m pip config list | sed -nE "s/^(global|:env:)\.($reach)='(.*)'$/\2 = \3/p" | sort -u) > "$work/pip.conf"
like_here=(--secret "id=pip,src=$work/pip.conf")
read -ra folders <<< "$(sed -nE '/index-url|find-links/s#.* = ##p' "$work/pip.conf" | tr '\n' ' ')"
for folder in "${folders[@]}"; do
  folder=${folder#file://} folder=${folder%/simple}
  [ ! -d "$folder" ] || like_here+=(--volume "$folder:$folder:ro")
done
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || like_here+=(--volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro)
image() {
  build bud --isolation chroot --format docker --no-cache --force-rm --quiet "${like_here[@]}" --build-arg "BASE=$base" \
    --file deploy/docker/Dockerfile --target "$1" --tag "localhost/qembed:$1" .
}
begin=$SECONDS
image cpu
echo "built in $((SECONDS - begin)) s, $(told '{{.Docker.Config.User}}' | sed 's/^/user /'), $(du -sh --apparent-size "$work/storage" | cut -f1) of storage"

mapfile -t environment < <(each .Docker.Config.Env)
mapfile -t entrypoint < <(each .Docker.Config.Entrypoint)
mapfile -t default < <(each .Docker.Config.Cmd)
mapfile -t check < <(each .Docker.Config.Healthcheck.Test)
user=$(told '{{.Docker.Config.User}}')
folder=$(told '{{.Docker.Config.WorkingDir}}')
[ "$user" = 10001:10001 ] && [ "${check[0]}" = CMD ]
container=$(build from localhost/qembed:cpu)
ROOT=$(build mount "$container")
export ROOT USER_ID=${user%:*} GROUP_ID=${user#*:} MODELS=$work/models CACHE=$work/cache FOLDER=$folder
install --directory --owner "$USER_ID" --group "$GROUP_ID" "$MODELS" "$CACHE"

# Becomes the command: in the container's root, as its user, without privileges, with the image's environment and no other.
as_the_image_says=(env --ignore-environment --chdir="$folder" "${environment[@]}"
  setpriv --reuid "$USER_ID" --regid "$GROUP_ID" --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs)
run() {
  # shellcheck disable=SC2016
  exec unshare --mount --pid --net --ipc --fork --kill-child bash -c '
    set -e
    ip link set lo up
    mount --bind "$ROOT" "$ROOT" && mount -o remount,bind,ro "$ROOT"
    mount -t proc proc "$ROOT/proc" && mount --rbind /dev "$ROOT/dev" && mount -t tmpfs shm "$ROOT/dev/shm"
    mount --rbind -o ro /sys "$ROOT/sys"
    mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmp "$ROOT/tmp"
    mount --bind "$MODELS" "$ROOT/models" && mount --bind "$CACHE" "$ROOT/cache"
    exec chroot "$ROOT" "$@"' run "${as_the_image_says[@]}" "${entrypoint[@]}" "$@"
}
inside() { nsenter --target "$server" --mount --pid --net --ipc chroot "$ROOT" "${as_the_image_says[@]}" "$@"; }

step "run qembed quantize --model sample"
(run quantize --model sample --force)

step "run with the default command: ${entrypoint[*]} ${default[*]}"
(run "${default[@]}") &
parent=$!
server=$(until pgrep --parent "$parent"; do sleep 0.1; done)
until inside "${check[@]:1}" 2> /dev/null; do
  kill -0 "$parent" 2> /dev/null || { wait "$parent"; exit 1; }
  sleep 1
done
cp "$ROOT/var/lib/dpkg/status" "$work/dpkg-status"
echo "healthy: ${check[*]:1}"
# shellcheck disable=SC2016
inside sh -c 'echo "PID 1: $(tr "\0" " " < /proc/1/cmdline)"; grep -E "^(Uid|NoNewPrivs|CapEff|CapBnd)" /proc/1/status'
inside touch /models/here /cache/here /tmp/here
if inside touch /opt/qembed/here 2> /dev/null; then
  echo "the root filesystem can be written to"
  exit 1
fi

step "embed a text"
inside python - <<'PYTHON'
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
texts = ["a program that plays music", "audio player", "a library for reading PDF files"]
vectors = [one.embedding for one in client.embeddings.create(model="sample-AWQ-INT4", input=texts).data]
for text, vector in zip(texts, vectors):
    print(f"{sum(a * b for a, b in zip(vectors[0], vector)):6.3f}  {text}   [{vector[0]:+.4f} … {len(vector)} dimensions]")
assert all(len(vector) == 256 and abs(sum(a * a for a in vector) - 1) < 1e-3 for vector in vectors)
PYTHON

step "SIGTERM to PID 1"
kill -TERM "$server"
code=0; wait "$parent" || code=$?
server=
echo "exit code $code"
[ "$code" = 0 ]

step "buildah build --target router"
image router
build rm "$container" > /dev/null
container=$(build from localhost/qembed:router)
build run --isolation chroot --user 10001:10001 "$container" -- vllm-router --help | sed -n 1p
