"""Packaging. The core needs seven small packages; everything else is an extra, imported where used."""

from setuptools import find_packages, setup

EXTRAS = {
    "hub": ["transformers>=5.0", "huggingface_hub>=1.0", "jinja2>=3.1"],
    "deepspeed": ["deepspeed>=0.18"],
    "track": ["wandb>=0.23", "matplotlib>=3.9"],
    "eval": ["sacrebleu>=2.4", "rouge-score>=0.1.2", "jieba>=0.42"],
    "bench": ["transformers>=5.0", "matplotlib>=3.9", "psutil>=6.0", "peft>=0.18", "trl>=0.20"],
    "parquet": ["pyarrow>=17.0"],
    "tokenizer": ["sentencepiece>=0.2.0"],
}
EXTRAS["dev"] = sorted(
    {"ruff>=0.9", "pytest>=8.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "psutil>=6.0"}
    | {package for name in EXTRAS for package in EXTRAS[name]}
)

setup(
    name="minillm",
    version="0.1.0",
    description="A large language model from scratch: tokenizer, pretraining, fine-tuning, evaluation, chat",
    license="Apache-2.0",
    packages=find_packages(include=["minillm", "minillm.*"]),
    package_data={"minillm": ["tokenizer/*.jinja"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "safetensors>=0.4.5",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "pyyaml>=6.0",
        "tyro>=0.9",
    ],
    extras_require=EXTRAS,
)
