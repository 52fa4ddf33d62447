# CPU image with the embedded models: docker build -t memdec . && docker run -p 8000:8000 memdec
ARG BASE=python:3.12-slim
FROM ${BASE} AS build
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY requirements/cpu.txt requirements/cpu.txt
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.txt \
 && pip install --no-cache-dir --no-deps --extra-index-url ${TORCH_INDEX} ${TORCH}
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY decoders decoders
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home memdec
COPY --from=build /venv /venv
COPY decoders/zoo /models
USER memdec
WORKDIR /home/memdec
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=90s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"
ENTRYPOINT ["memdec", "serve"]
CMD ["/models/base", "--decoder", "biomed=/models/biomed", "--decoder", "finance=/models/finance", "--decoder", "law=/models/law", \
     "--decoder", "python=/models/python", "--host", "0.0.0.0", "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "268435456"]
