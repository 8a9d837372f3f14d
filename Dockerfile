# lq in a container: CPU by default, CUDA by build arguments, no root at run time, all state in one volume.
#
#   docker build -t lq .
#   docker build -t lq:cuda --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#     --build-arg RUNTIME=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg CMAKE_ARGS=-DGGML_CUDA=on .
#
# BASE            any Debian or Ubuntu image with Python 3.11 or newer in its package archive
# CMAKE_ARGS      added to how llama.cpp is compiled; -DGGML_NATIVE=OFF stands already, so that the image runs on
#                 every x86-64 CPU with AVX2 (2013 and later) and not only on the one that built it
# TORCH_INDEX     PyTorch's own index of CPU wheels; without it pip's index decides, on Linux often for CUDA
# PIP_INDEX_URL   your package mirror, and PIP_EXTRA_INDEX_URL a second one
# wheelhouse/     filled by `make wheelhouse` with the base image's version of Python: no network for Python
ARG BASE=debian:bookworm-slim
ARG RUNTIME=${BASE}

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential cmake git \
 && rm -rf /var/lib/apt/lists/*
ARG CMAKE_ARGS=""
ARG TORCH_INDEX=""
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
COPY requirements.lock wheelhous[e] wheelhouse/
RUN python3 -m venv /opt/lq \
 && export CMAKE_ARGS="-DGGML_NATIVE=OFF $CMAKE_ARGS" \
 && if [ -z "$PIP_INDEX_URL" ]; then unset PIP_INDEX_URL; fi \
 && if [ -z "$PIP_EXTRA_INDEX_URL" ]; then unset PIP_EXTRA_INDEX_URL; fi \
 && if ls wheelhouse/*.whl >/dev/null 2>&1; then export PIP_NO_INDEX=1 PIP_FIND_LINKS=/src/wheelhouse; \
    elif [ -n "$TORCH_INDEX" ]; then \
      /opt/lq/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' wheelhouse/requirements.lock)"; \
    fi \
 && /opt/lq/bin/pip install --no-cache-dir -r wheelhouse/requirements.lock
COPY pyproject.toml hatch_build.py README.md ./
COPY engine engine/
COPY models models/
COPY quantize quantize/
COPY rag rag/
COPY prompts prompts/
COPY server server/
COPY lq lq/
RUN if [ "$(uname -m)" = x86_64 ]; then export LQ_KERNEL_FLAGS=-march=x86-64-v3; else export LQ_KERNEL_FLAGS=; fi \
 && /opt/lq/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${RUNTIME}
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 libgomp1 ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home --home-dir /home/lq lq \
 && install -d -o lq -g lq /data
COPY --from=build /opt/lq /opt/lq
# `lq demo` finds them here: docker run --rm lq demo --once
COPY examples/questions.json /opt/lq/share/lq/examples/
COPY examples/handbook /opt/lq/share/lq/examples/handbook/
ENV PATH=/opt/lq/bin:$PATH LQ_HOME=/data HF_HOME=/data/hub PYTHONUNBUFFERED=1
USER lq
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
  CMD python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"
ENTRYPOINT ["lq"]
# 0.0.0.0 is refused without a key: give LQ_API_KEY, or mount a file and name it with --api-key-file.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
