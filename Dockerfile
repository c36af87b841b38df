# shodh_moe for GPU clusters: CUDA torch, DeepSpeed, NVIDIA apex with its CUDA extensions, MPI.
#
#   docker build --build-arg MAX_JOBS=8 --tag shodh_moe .
#   docker run --gpus all --ipc host shodh_moe run --config /opt/source/configs/quickstart.yaml
#
# The CUDA release is that of the torch pinned in constraints.txt (2.13.0 is built with 13.0):
# apex and DeepSpeed's operations compile against both, so change them together.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ampere, Hopper, Blackwell. MAX_JOBS bounds the compilers that run at once: about 4 GB each.
ARG MAX_JOBS=4
ENV TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0" \
    CUDA_HOME=/usr/local/cuda \
    VIRTUAL_ENV=/opt/shodh \
    PATH=/opt/shodh/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# The image is the pin: the archive of an Ubuntu release keeps only the newest build of a
# package, so versions written here would stop resolving at the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential \
        ca-certificates \
        git \
        iproute2 \
        libaio-dev \
        libopenmpi-dev \
        ninja-build \
        openmpi-bin \
        openssh-client \
        openssh-server \
        pdsh \
        python3 \
        python3-dev \
        python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv "$VIRTUAL_ENV"

# Torch first and alone: the largest layer, and what apex compiles against.
WORKDIR /opt/source
COPY constraints.txt .
RUN pip install --constraint constraints.txt torch numpy packaging setuptools wheel ninja

# The `apex` of the package registry is another project: NVIDIA's is built from source.
# Older tags are written for C++17, and this torch compiles extensions as C++20. No GPU is visible
# during the build, so TORCH_CUDA_ARCH_LIST says what to compile for; ninja obeys MAX_JOBS.
ARG APEX_TAG=26.09
RUN git clone --depth 1 --branch "$APEX_TAG" https://github.com/NVIDIA/apex.git /opt/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        pip install --no-build-isolation --no-deps --constraint constraints.txt /opt/apex \
    && rm -rf /opt/apex

COPY setup.py pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY shodh_moe shodh_moe
COPY launch launch
COPY configs configs
COPY examples examples
# mpi4py is compiled against the MPI of the system, the one that the cluster's launcher starts.
RUN pip install --constraint constraints.txt --no-binary mpi4py mpi4py \
    && pip install --constraint constraints.txt . \
    && pip check

# A build that cannot train must fail here and not on the cluster. None of this needs a GPU.
RUN python -c "import torch, amp_C, deepspeed; from apex.optimizers import FusedAdam; assert torch.version.cuda" \
    && python -c "from mpi4py import MPI; print(MPI.Get_library_version())" \
    && shodh --help > /dev/null

WORKDIR /workspace
ENTRYPOINT ["shodh"]
CMD ["--help"]
