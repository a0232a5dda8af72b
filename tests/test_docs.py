"""README and docs: short enough, links that resolve, results that are there and cited, examples that run"""
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'runtime/README.md')),
    *sorted((ROOT / 'docs').glob('*.md')),
]
TEXT = {path: path.read_text(encoding='utf-8') for path in PAGES}


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r'```.*?```', '', text, flags=re.S)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in re.findall(r'^#+ (.+)$', prose, re.M)}


def tracked(folder):
    listed = subprocess.run(['git', 'ls-files', folder], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in listed.stdout.split()]


def test_readme_has_at_most_150_lines():
    assert len(TEXT[ROOT / 'README.md'].splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXT[page]):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding='utf-8')), target


def test_tree_names_every_file_and_no_other():
    tree = re.search(r'```\n(timm_rs/.*?)```', TEXT[ROOT / 'CONTRIBUTING.md'], re.S)[1]
    named = set(re.findall(r'\w+\.py', tree))
    found = {path.name for folder in ('timm_rs', 'runtime/timm_rs_runtime') for path in (ROOT / folder).glob('*.py')}
    assert found - named == {'__init__.py', '__main__.py', 'version.py'}
    assert named - found == {'train_rs.py', 'validate_rs.py'}


def test_named_results_exist_and_others_are_gone():
    cited = {name.rstrip('.,') for text in TEXT.values() for name in re.findall(r'results/([\w.-]+)', text)}
    assert [name for name in sorted(cited) if not (ROOT / 'results' / name).exists()] == []
    stems = {name.rpartition('.')[0] or name for name in cited}
    names = {path.relative_to(ROOT / 'results').parts[0] for path in tracked('results')} - {'README.md'}
    assert sorted(name for name in names if (name.rpartition('.')[0] or name) not in stems) == []
    commands = (ROOT / 'results' / 'README.md').read_text(encoding='utf-8')
    assert [stem for stem in sorted(stems) if f'`{stem}' not in commands and stem != 'README'] == []


@pytest.mark.parametrize('page', ['README.md', 'docs/train.md'])
def test_examples_run(page):
    for code in re.findall(r'```python\n(.*?)```', TEXT[ROOT / page], re.S):
        exec(compile(code, page, 'exec'), {})
