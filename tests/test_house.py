"""Imports only go down: the floors of the house, as data"""
import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import timm_rs

ROOT = Path(__file__).parents[1]
SCRIPTS = ('train_rs', 'validate_rs')
# From the ground up. A room imports rooms of lower floors and itself, never one of its own floor.
FLOORS = (
    ('timm_rs_runtime',),
    ('timm_rs._compat', 'timm_rs.version'),
    ('timm_rs.resolutions', 'timm_rs.records'),
    ('timm_rs.private_bn', 'timm_rs.checkpoint'),
    ('timm_rs.switchable',),
    ('timm_rs.quant', 'timm_rs.data'),
    ('timm_rs.models', 'timm_rs.evaluate'),
    ('timm_rs.load', 'timm_rs.calibrate'),
    ('timm_rs.train', 'timm_rs.export', 'timm_rs.plot'),
    ('timm_rs.hub',),
    ('timm_rs',),  # the list of what is public
    ('timm_rs_cli', *SCRIPTS),
)
# What a room takes from outside, of those that are to stay light.
LIGHT = {
    'timm_rs_runtime': {
        'PIL', 'fastapi', 'gradio', 'numpy', 'onnxruntime', 'prometheus_client', 'pyarrow', 'pydantic', 'ray',
        'starlette', 'uvicorn'},
    'timm_rs_cli': {'huggingface_hub', 'timm', 'torch'},  # inside run()
}


def find_modules():
    """Return the file of each module, by its dotted name."""
    paths = [path for folder in ('timm_rs', 'timm_rs_cli') for path in (ROOT / folder).rglob('*.py')]
    modules = {path.relative_to(ROOT).with_suffix(''): path for path in paths}
    runtime = ROOT / 'runtime'
    modules.update({p.relative_to(runtime).with_suffix(''): p for p in runtime.glob('timm_rs_runtime/**/*.py')})
    modules = {'.'.join(name.parts).removesuffix('.__init__'): path for name, path in modules.items()}
    return dict(modules, **{name: ROOT / f'{name}.py' for name in SCRIPTS})


MODULES = find_modules()


def imports(path, name=''):
    """Give the dotted names that a file imports, also inside functions, with the line of each."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
            source = '.'.join([*above, *([node.module] if node.module else [])])
            yield from ((f'{source}.{alias.name}', node.lineno) for alias in node.names)


def of_ours(imported):
    """Return the module of ours that a dotted name stands for, or is defined in, None for others."""
    while imported and imported not in MODULES:
        imported = imported.rpartition('.')[0]
    return imported or None


GRAPH = {
    name: {of_ours(imported): line for imported, line in imports(path, name) if of_ours(imported) not in (None, name)}
    for name, path in MODULES.items()
}


def room_of(module):
    """Return the room that a module belongs to, the narrowest that there is, and the floor of it."""
    rooms = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    is_public = module == 'timm_rs'
    found = [room for room in rooms if f'{module}.'.startswith(f'{room}.') and (room != 'timm_rs' or is_public)]
    assert found, f'{module} belongs to no room: say on which floor it is'
    room = max(found, key=len)
    return room, rooms[room]


@pytest.mark.parametrize('name', MODULES)
def test_imports_go_down(name):
    room, floor = room_of(name)
    for imported, line in GRAPH[name].items():
        other, below = room_of(imported)
        assert other == room or below < floor, f'{name}:{line} imports {imported}, which is not on a lower floor'


def test_there_are_no_circles():
    done = set()

    def visit(name, above):
        assert name not in above, ' -> '.join([*above[above.index(name):], name])
        if name not in done:
            for imported in GRAPH[name]:
                # A package runs before its modules; what it lists is below it.
                if not f'{name}.'.startswith(f'{imported}.'):
                    visit(imported, [*above, name])
            done.add(name)

    for name in MODULES:
        visit(name, [])


def test_nothing_imports_a_script():
    folders = ('benchmarks', 'experiments', 'tools', 'examples')
    paths = [*MODULES.values(), *(path for folder in folders for path in (ROOT / folder).glob('*.py'))]
    for path in paths:
        assert not {imported.partition('.')[0] for imported, _ in imports(path)} & set(SCRIPTS), path


@pytest.mark.parametrize('room', LIGHT)
def test_light_rooms(room):
    for name in (m for m in MODULES if m.partition('.')[0] == room):
        for imported, line in imports(MODULES[name], name):
            top = imported.partition('.')[0]
            if top not in sys.stdlib_module_names and of_ours(imported) is None:
                assert top in LIGHT[room], f'{name}:{line} imports {imported}'


def test_commands_import_what_they_need_where_they_run():
    for name in (m for m in MODULES if m.startswith('timm_rs_cli')):
        for node in ast.parse(MODULES[name].read_text()).body:
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
            if isinstance(node, ast.FunctionDef) and node.name in ('run', 'load', 'read_labels'):
                continue
            for module in (alias.name for n in inner if isinstance(n, ast.Import) for alias in n.names):
                assert module in sys.stdlib_module_names, f'{name} imports {module} to parse'
            for n in inner:
                if isinstance(n, ast.ImportFrom) and not n.level:
                    assert n.module.partition('.')[0] in (*sys.stdlib_module_names, 'timm_rs_runtime'), n.module


def test_public_names_are_a_plain_list():
    tree = ast.parse(MODULES['timm_rs'].read_text())
    kinds = [type(node) for node in tree.body if not isinstance(node, ast.ImportFrom)]
    assert kinds == [ast.Expr, ast.Try, ast.Assign]  # docstring, the check for the runtime, __all__
    assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) for node in ast.walk(tree))
    assert all(hasattr(timm_rs, name) for name in timm_rs.__all__) and timm_rs.__all__ == sorted(timm_rs.__all__)
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(timm_rs.__all__)


@pytest.mark.parametrize('package, last', [
    ('timm_rs', 'ImportError: timm_rs needs timm_rs_runtime: pip install ./runtime .'),
    ('timm_rs_cli', 'timm-rs: error: timm_rs needs timm_rs_runtime: pip install ./runtime .'),
])
def test_the_runtime_is_missing(package, last):
    program = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import {package}'
    result = subprocess.run([sys.executable, '-I', '-S', '-c', program], stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == last


def private_names(path):
    """Give the private names of other packages that a file imports or reaches, with the line of each."""
    tree = ast.parse(path.read_text())
    for imported, line in imports(path, '.'):
        foreign = of_ours(imported) is None and not imported.startswith('.')
        if foreign and re.search(r'(^|\.)_(?!_)', imported) and imported.partition('.')[0] in FOREIGN:
            yield imported, line
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r'_(?!_)', node.attr):
            root = node
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in FOREIGN:
                yield ast.unparse(node), node.lineno


FOREIGN = ('timm', 'torch', 'torchvision', 'huggingface_hub', 'safetensors', 'onnx', 'onnxruntime')


def test_private_names_of_others_are_in_one_room():
    found = defaultdict(list)
    for name, path in MODULES.items():
        if name != 'timm_rs._compat':
            found[name] += [f'{private} in line {line}' for private, line in private_names(path)]
    assert not {name: privates for name, privates in found.items() if privates}
