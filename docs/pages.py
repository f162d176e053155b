"""A hook of mkdocs: the site has the repository's folders, so that a page's relative links hold raw and built."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SHOWN = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "docs/*.css",
    "bench/results/*.png",
    "examples/*.*",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put what is shown in the place of `docs` alone; what is there besides is the theme's."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files
