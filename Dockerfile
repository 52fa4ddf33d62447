# The server as an image, with the embedded models:
#   docker build -t memdec .                        for CPUs
#   docker build -t memdec:cuda --target cuda .     for NVIDIA GPUs
# Python's own slim image; any Debian with python 3.11 to 3.13 and venv will do. CUDA's libraries come from PyPI, the driver from the host.
ARG BASE=python:3.11.14-slim-bookworm

# What the CPU server imports: nothing that only training, plots, video or offloading to a GPU need.
FROM ${BASE} AS packages-cpu
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/venv/bin:$PATH
WORKDIR /packages
COPY requirements/cpu.txt ./
# hadolint ignore=DL3013
RUN python -m venv /venv \
 && grep -vE '^(accelerate|contourpy|cycler|fonttools|intel-cmplr-lib-ur|kiwisolver|matplotlib|opencv-python-headless|peft|pyarrow|pyparsing|zstandard)==' \
      cpu.txt > serving.txt \
 && pip install --no-cache-dir --no-deps -r serving.txt \
 && pip install --no-cache-dir --no-deps --extra-index-url ${TORCH_INDEX} ${TORCH} \
 && pip uninstall --yes pip \
 && rm -rf /venv/lib/libomptarget* /venv/lib/*.a /venv/lib/*.dbg \
      /venv/lib/python3*/site-packages/torch/test /venv/lib/python3*/site-packages/torch/bin/test_* /venv/lib/python3*/site-packages/torch/include

# vLLM's own build for CUDA brings its torch. What it compiles at run time needs torch's headers, so these stay.
FROM ${BASE} AS packages-cuda
ENV PATH=/venv/bin:$PATH
WORKDIR /packages
COPY requirements/cuda.txt requirements/cuda.lock ./
RUN python -m venv /venv \
 && pip install --no-cache-dir -c cuda.lock -r cuda.txt \
 && pip uninstall --yes pip

# memdec itself, in a tree of its own that is laid over either: a change of code changes a small layer.
FROM ${BASE} AS code
ENV PATH=/venv/bin:$PATH
WORKDIR /src
RUN python -m venv /venv && pip install --no-cache-dir setuptools==78.1.1
COPY pyproject.toml README.md LICENSE ./
COPY memdec memdec
COPY server server
COPY decoders decoders
RUN pip install --no-cache-dir --no-deps --no-build-isolation --prefix=/memdec .

FROM ${BASE} AS server
# Debian keeps only the newest version of a package, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home memdec
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
WORKDIR /home/memdec
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/live', timeout=5)"]
ENTRYPOINT ["memdec", "serve"]

FROM server AS cuda
# Triton builds its launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /venv /venv
COPY decoders/zoo /models
COPY --from=code /memdec /venv
USER 10001:10001
CMD ["/models/base", "--decoder", "biomed=/models/biomed", "--decoder", "finance=/models/finance", "--decoder", "law=/models/law", \
     "--decoder", "python=/models/python", "--host", "0.0.0.0"]

FROM server AS cpu
COPY --from=packages-cpu /venv /venv
COPY decoders/zoo /models
COPY --from=code /memdec /venv
USER 10001:10001
CMD ["/models/base", "--decoder", "biomed=/models/biomed", "--decoder", "finance=/models/finance", "--decoder", "law=/models/law", \
     "--decoder", "python=/models/python", "--host", "0.0.0.0", "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "268435456"]
