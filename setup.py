from pathlib import Path

from setuptools import find_namespace_packages, setup

demo = ["transformers>=5", "matplotlib", "tqdm"]
paper = [*demo, "datasets", "scikit-learn", "scipy"]
bench = ["matplotlib", "tqdm", "pytest-benchmark"]

setup(
    name="adapter-ops",
    version="0.1.0",
    description="Fused Triton kernels for the bottleneck adapters of Houlsby et al. (2019), forward and backward",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # adapter_ops/kernels is a link to kernels/, which has no __init__.py: a top-level package of that name would
    # shadow the one that transformers imports.
    packages=find_namespace_packages(include=["adapter_ops", "adapter_ops.*"]),
    package_data={"adapter_ops": ["py.typed"], "adapter_ops.kernels": ["*.c"]},
    install_requires=["torch>=2.11", "triton>=3.6", "numpy", "safetensors"],
    extras_require={
        "demo": demo,
        "paper": paper,
        "bench": bench,
        "test": [*paper, *bench, "pytest", "pytest-xdist", "hypothesis", "accelerate", "ruff", "mypy", "setuptools"],
    },
)
