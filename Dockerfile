# One image for all services of a deployment: SuperLink, gateway, ServerApp, SuperNodes, ClientApps.
#   docker build -t fedcopra:cpu --build-arg TORCH_INDEX=INDEX_OF_CPU_WHEELS .
#   docker build -t fedcopra:cuda --build-arg TORCH=cuda .
# INDEX_OF_CPU_WHEELS is what PyTorch's installation page names for pip on Linux without CUDA; pip's
# own default brings a CUDA build, and the image says so if it is not the one that was asked for.
FROM python:3.11-slim AS installed
ARG TORCH=cpu
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /python
WORKDIR /source
COPY constraints.txt ./
RUN /python/bin/pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt torch \
    && /python/bin/python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; \
sys.exit(found != '${TORCH}' and 'asked for TORCH=${TORCH}, got a build for ' + found + ': give TORCH_INDEX')"
COPY pyproject.toml ./
# What the project needs, without its code: a change of the code then builds, and travels, in seconds.
RUN /python/bin/python -c "import tomllib; \
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > wanted.txt \
    && /python/bin/pip install -c constraints.txt -r wanted.txt "setuptools>=77"

FROM installed AS code
COPY README.md LICENSE ./
COPY common common
COPY strategies strategies
COPY clients clients
COPY server server
RUN /python/bin/pip install --no-deps --no-build-isolation --prefix /fedcopra .

# What nothing here runs: tests, headers, symbols for debuggers, Ray's Java, Arrow's network services,
# and the installers, so that nothing can be installed while a run goes on.
FROM installed AS lean
RUN apt-get update && apt-get install --yes --no-install-recommends binutils
RUN cd /python/lib/python3.*/site-packages \
    && find . -type d \( -name tests -o -name include \) -prune -exec rm -r {} + \
    && rm -r torch/test torch/bin/*[tT]est* torch/bin/protoc* ray/jars ray/rllib ray/dashboard/client \
        pyarrow/*arrow_flight* pyarrow/_flight* pyarrow/*arrow_s3* pyarrow/_s3fs* \
    && find torch ray pyarrow aiohttp fontTools kiwisolver sqlalchemy uvloop -type f \
        \( -name "*.so*" -o -name raylet -o -name gcs_server \) -exec strip --strip-unneeded {} + \
    && rm /python/bin/uv /python/bin/uvx \
    && /python/bin/pip uninstall --yes setuptools pip

FROM python:3.11-slim
# The gateway is nginx: it lets sites reach Flower's fleet path, and nothing else.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /etc/nginx/sites-enabled /var/log/nginx \
    && groupadd --gid 49999 app \
    && useradd --no-create-home --home-dir /app --uid 49999 --gid 49999 app \
    && mkdir -p /app/data /app/results /app/state && chown -R app:app /app
COPY --from=lean /python /python
COPY --from=code /fedcopra /python
ENV PATH=/python/bin:$PATH HOME=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 \
    MPLCONFIGDIR=/tmp/matplotlib FEDCOPRA_CACHE=/tmp/fedcopra
WORKDIR /app
USER app
CMD ["fedcopra", "--help"]
