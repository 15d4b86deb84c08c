import revgrad_kernels

import revgrad


def test_everything_promised_is_there_and_documented():
    for package in (revgrad, revgrad_kernels):
        assert package.__all__ == sorted(package.__all__)
        for name in package.__all__:
            assert getattr(package, name).__doc__, name
