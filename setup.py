"""Lists the packages: the folders under spg/, and conf/, which is installed as spg.conf."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["spg", "spg.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
        "spg.conf",
    ],
    package_dir={"spg.conf": "conf"},
)
