"""What goes into a wheel: the library, the kernels, and the YAML trees, mapped into the package as ``_configs`` and ``_recipes``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["posttrain", "posttrain.*"]), "posttrain_kernels", "posttrain._configs", "posttrain._recipes"],
    package_dir={"posttrain_kernels": "kernels/posttrain_kernels", "posttrain._configs": "configs", "posttrain._recipes": "recipes"},
    package_data={
        "posttrain._configs": ["**/*.yaml"],
        "posttrain._recipes": ["**/*"],
        "posttrain": ["py.typed"],
        "posttrain_kernels": ["**/*.md"],
    },
)
