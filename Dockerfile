# The service, the training and the environment that both need.
#
#   docker build -t anomaly-api .                                            CPU (default)
#   docker build -t anomaly-api --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .     CUDA
#   a torch wheel in docker/wheels/ goes before the index
#
# No `# syntax=` line: the builder's own front end does, and nothing is fetched for it.
ARG BASE=debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log

FROM python AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml constraints.txt docker/requirements.py ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The copy of pip that makes the environment stays outside of it.
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    python3 -m venv /pip && python3 -m venv --without-pip /opt/venv \
    && python3 requirements.py serve otel > serve.txt \
    && if ls /wheels/torch-*.whl > /dev/null 2>&1; then from="--find-links=/wheels"; \
       else from="--extra-index-url=${TORCH_INDEX}"; fi \
    && /pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
       --constraint constraints.txt "$from" -r serve.txt

FROM build AS train-environment
RUN python3 requirements.py project train > train.txt \
    && /pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
       --constraint constraints.txt -r train.txt

FROM build AS serve-environment
COPY docker/strip.py ./
RUN /opt/venv/bin/python strip.py

FROM python AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Reconstruction anomaly service" \
      org.opencontainers.image.description="Detects anomalous images by the reconstruction error of an autoencoder" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv

FROM runtime AS train
COPY --from=train-environment /opt/venv /opt/venv
COPY anomaly anomaly
COPY app app
COPY training training
COPY pyproject.toml ./
# A new volume takes over the owner of the folder that it covers.
RUN install -d -o 10001 -g 10001 model_store
ENV MPLBACKEND=Agg MPLCONFIGDIR=/tmp/matplotlib HOME=/tmp
USER 10001:10001
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]

# Last, so that it is what a plain `docker build` makes.
FROM runtime AS api
COPY --from=serve-environment /opt/venv /opt/venv
COPY app app
COPY examples examples
COPY model_store model_store
RUN python -m compileall -q app && install -d -o 10001 -g 10001 var /models
ENV ANOMALY_HOST=0.0.0.0 ANOMALY_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=2s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-ISc", "import os, socket as s; p = os.environ.get('ANOMALY_PORT', ''); c = s.create_connection(('127.0.0.1', int(p) if p.isdigit() else 8000), 2); c.sendall(b'GET /readyz HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in c.recv(32))"]
CMD ["python", "-m", "app"]
