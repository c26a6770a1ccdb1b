"Packaging. Every value comes from settings.ini; pyproject.toml names the build system and what is read from here."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters="=", interpolation=None)
config.read_string((here / "settings.ini").read_text(encoding="utf-8"))
s = config["DEFAULT"]
major, oldest = map(int, s["min_python"].split("."))

setup(
    version=s["version"],
    description=s["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=s["author"],
    author_email=s["author_email"],
    url=s["git_url"],
    keywords=s["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Programming Language :: Python :: 3",
    ] + [f"Programming Language :: Python :: {major}.{minor}" for minor in range(oldest, 15)],
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=[s["lib_path"], f"{s['lib_path']}.*"]),
    package_data={s["lib_path"]: ["*.mplstyle"]},
    include_package_data=False,
    install_requires=s["requirements"].split(),
    # `dev_requirements` becomes the extra "dev", and so on for every such line.
    extras_require={key.removesuffix("_requirements"): s[key].split() for key in s if key.endswith("_requirements")},
    entry_points={"console_scripts": s["console_scripts"].split()},
    zip_safe=False,
)
