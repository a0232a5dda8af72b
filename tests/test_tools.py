"""Libraries that take a network of timm: transformers, Lightning, accelerate and others, as docs/tools.md shows them"""
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_rs.hub.convert import save_model

PAGE = (Path(__file__).parents[1] / 'docs' / 'tools.md').read_text(encoding='utf-8')
EXAMPLES = {
    text.split('\n')[0]: re.findall(r'```python\n(.*?)```', text, re.S)
    for text in re.split(r'^##+ ', PAGE, flags=re.M)}


@pytest.mark.parametrize('section', [name for name, found in EXAMPLES.items() if found])
def test_examples_run(section, tmp_path, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for code in EXAMPLES[section]:
        for name in re.findall(r'^(?:from|import) (accelerate|lightning|segmentation\w+|transformers)', code, re.M):
            pytest.importorskip(name)
        exec(compile(code, section, 'exec'), {'__name__': 'example'})


def test_transformers(tmp_path):
    """The same numbers in transformers, saved by it, and in timm again; all sizes, or one that timm alone builds."""
    transformers = pytest.importorskip('transformers')
    load = transformers.AutoModelForImageClassification.from_pretrained
    model = timm.create_model('rs_resnet10t.imagenette', pretrained=True).eval()
    save_model(model, str(tmp_path / 'all'))
    save_model(model.at(32), str(tmp_path / 'one'))
    wrapped = load(tmp_path / 'all').eval()
    wrapped.save_pretrained(tmp_path / 'again')
    assert wrapped.config.id2label[1] == load(tmp_path / 'again').config.id2label[1] == 'English springer'
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    one = load(tmp_path / 'one').eval()
    assert type(one.timm_model) is type(timm.create_model('resnet10t')) and one.config.id2label[0] == 'tench'
    with torch.no_grad():
        for size in model.resolutions:
            x = torch.randn(2, 3, size, size)
            expected = model(x)
            assert torch.equal(wrapped(pixel_values=x).logits, expected) and torch.equal(again(x), expected)
            if size == 32:
                torch.testing.assert_close(one(pixel_values=x).logits, expected)
    classify = transformers.pipeline('image-classification', model=str(tmp_path / 'all'))
    (best, *_) = classify(Image.new('RGB', (60, 50)))
    assert best['label'] in wrapped.config.id2label.values() and 0 < best['score'] <= 1
