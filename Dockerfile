# One image for all services of a deployment: SuperLink, gateway, ServerApp, SuperNodes, ClientApps.
#   docker build -t fedcopra:cpu --build-arg TORCH_INDEX=INDEX_OF_CPU_WHEELS .
#   docker build -t fedcopra:cuda --build-arg TORCH=cuda .
# INDEX_OF_CPU_WHEELS is what PyTorch's installation page names for pip on Linux without CUDA; pip's
# own default brings a CUDA build, and the image says so if it is not the one that was asked for.
FROM python:3.11-slim AS build
ARG TORCH=cpu
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /python
WORKDIR /source
COPY constraints.txt ./
RUN /python/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt torch \
    && /python/bin/python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; \
sys.exit(found != '${TORCH}' and 'asked for TORCH=${TORCH}, got a build for ' + found + ': give TORCH_INDEX')"
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY strategies strategies
COPY clients clients
COPY server server
RUN /python/bin/pip install -c constraints.txt . \
    && find /python -name tests -type d -path '*/site-packages/*' -prune -exec rm -r {} + \
    && /python/bin/pip uninstall --yes pip

FROM python:3.11-slim
# The gateway is nginx: it lets sites reach Flower's fleet path, and nothing else.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/* /etc/nginx/sites-enabled /var/log/nginx \
    && groupadd --gid 49999 app \
    && useradd --no-create-home --home-dir /app --uid 49999 --gid 49999 app \
    && mkdir -p /app/data /app/results /app/state && chown -R app:app /app
COPY --from=build /python /python
ENV PATH=/python/bin:$PATH HOME=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1
WORKDIR /app
USER app
