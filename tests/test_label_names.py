"""The file that names the classes"""
import pytest

from timm_rs.records import labels_beside, read_label_names, write_label_names


def test_label_names_beside_checkpoints(tmp_path):
    names = tmp_path / 'label_names.txt'
    for numbers, num_classes in ((None, 2), ({}, 2), (dict(cat=0), 2), (dict(cat=0, dog=0), 2), (dict(cat=1, dog=2), 2),
                                 ({'two\nlines': 0}, 1), ({'': 0, 'cat': 1}, 2), ({'caf\udce9': 0, 'cat': 1}, 2)):
        write_label_names(str(tmp_path), numbers, num_classes)
        assert not names.exists()
    write_label_names(str(tmp_path), {'hund \u2028 ä': 1, 'cat': 0}, 2)
    assert names.read_bytes().decode('utf-8') == 'cat\nhund \u2028 ä\n'
    assert read_label_names(str(names)) == ['cat', 'hund \u2028 ä']
    assert labels_beside(str(tmp_path)) == labels_beside(str(names)) == str(names)
    assert labels_beside(str(tmp_path / 'missing.pth')) is None


@pytest.mark.parametrize('content, message', [
    (b'cat\n\ndog\n', 'labels.txt: line 2 has 0 characters, expected the name of a class'),
    (b'', 'line 1 has 0 characters'),
    (b'x' * 1001, 'line 1 has 1001 characters'),
    (b'cat\n\xff\n', 'labels.txt is not text in UTF-8: invalid start byte at byte 4'),
])
def test_bad_label_names(content, message, tmp_path):
    (tmp_path / 'labels.txt').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_label_names(str(tmp_path / 'labels.txt'))


def test_label_names_of_any_system(tmp_path):
    (tmp_path / 'labels.txt').write_bytes(b'\xef\xbb\xbfcat\r\ndog\r\n\r\n')
    assert read_label_names(str(tmp_path / 'labels.txt')) == ['cat', 'dog']
