"""Lists the packages; pyproject.toml has all other metadata but cannot map `configs/` to `dualsm.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dualsm", "dualsm.*"]), "dualsm.configs"],
    package_dir={"dualsm.configs": "configs"},  # `--config=dualsm:NAME` reads the recipes from there
)
