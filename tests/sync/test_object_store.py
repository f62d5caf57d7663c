import numpy as np
import pytest
import torch

from posttrain.sync.fingerprint import fingerprint
from posttrain.sync.object_store import pack, put, read


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(7, 5, generator=g),
        "half": torch.randn(3, 2, generator=g).bfloat16(),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6, generator=g).t(),
        "empty": torch.zeros(0, 3),
        "integers": torch.arange(5),
    }


@pytest.mark.parametrize("bucket_bytes", [1, 200, 10**6])
def test_round_trip_whatever_the_bucket_size(bucket_bytes):
    given = tensors()
    buckets = list(pack(given.items(), bucket_bytes=bucket_bytes))
    assert len(buckets) == {1: 6, 10**6: 1}.get(bucket_bytes, len(buckets)) and (bucket_bytes != 200 or 1 < len(buckets) < 6)
    back = dict(read(buckets))
    assert list(back) == list(given)
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_cast_to_the_engine_dtype_touches_floats_only():
    back = dict(read(pack(tensors().items(), dtype=torch.bfloat16)))
    assert {k: v.dtype for k, v in back.items() if k != "integers"} == dict.fromkeys([k for k in back if k != "integers"], torch.bfloat16)
    assert back["integers"].dtype == torch.int64
    assert torch.equal(back["matrix"], tensors()["matrix"].bfloat16())


def test_read_takes_mappings_and_read_only_arrays():
    (bucket,) = pack(tensors().items())
    bucket.data.flags.writeable = False
    assert fingerprint_floats(read([bucket])) == fingerprint_floats(read([tensors()]))
    assert isinstance(bucket.data, np.ndarray) and all(entry.offset % 64 == 0 for entry in bucket.index)


def fingerprint_floats(named):
    return fingerprint((name, tensor) for name, tensor in named if tensor.is_floating_point())


def test_put_returns_references_and_the_fingerprint_of_what_was_put(monkeypatch):
    import ray

    store = []
    monkeypatch.setattr(ray, "put", lambda value: store.append(value) or len(store) - 1)
    given = {k: v for k, v in tensors().items() if k != "integers"}
    refs, prints = put(given.items(), bucket_bytes=100, dtype=torch.bfloat16)
    assert refs == list(range(len(store))) and len(refs) > 1
    assert prints == fingerprint((k, v.bfloat16()) for k, v in given.items())
    monkeypatch.setattr(ray, "get", lambda ref: store[ref])
    assert fingerprint(read(refs)) == prints
