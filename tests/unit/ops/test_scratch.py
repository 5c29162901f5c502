"""Scratch memory is the same again for the same name, never shared between names or threads, and goes when it is told to."""

import threading

import torch

from luthier.ops.scratch import release_scratch, scratch, widened

CPU = torch.device("cpu")


def test_one_name_is_one_buffer_that_grows() -> None:
    small = scratch("a", (3, 5), torch.float32, CPU)
    assert small.shape == (3, 5) and small.dtype == torch.float32
    assert scratch("a", (5, 2), torch.float32, CPU).data_ptr() == small.data_ptr()
    assert scratch("a", (2, 2), torch.float64, CPU).data_ptr() == small.data_ptr()
    large = scratch("a", (300, 5), torch.float32, CPU)
    assert scratch("a", (3, 5), torch.float32, CPU).data_ptr() == large.data_ptr()


def test_two_names_do_not_overlap() -> None:
    first, second = (scratch(name, (100,), torch.float32, CPU) for name in ("a", "b"))
    first.fill_(1.0)
    second.fill_(2.0)
    assert first.eq(1.0).all()


def test_each_thread_has_its_own() -> None:
    mine, theirs = scratch("a", (4,), torch.float32, CPU).fill_(1.0), []
    thread = threading.Thread(target=lambda: theirs.append(scratch("a", (4,), torch.float32, CPU).fill_(2.0)))
    thread.start()
    thread.join()
    assert mine.eq(1.0).all() and theirs[0].eq(2.0).all()


def test_another_device_gets_a_new_tensor() -> None:
    first, second = (scratch("a", (4,), torch.float32, torch.device("meta")) for _ in range(2))
    assert first is not second and first.device.type == "meta"


def test_what_has_the_dtype_is_not_copied() -> None:
    x = torch.randn(3, 2)
    assert widened("a", x, torch.float32) is x
    half = x.bfloat16()
    wide = widened("a", half, torch.float32)
    assert torch.equal(wide, half.float()) and wide.data_ptr() == scratch("a", (1,), torch.float32, CPU).data_ptr()


def test_released_buffers_are_gone() -> None:
    import weakref

    buffer = weakref.ref(scratch("a", (4,), torch.float32, CPU)._base)
    release_scratch()
    assert buffer() is None
