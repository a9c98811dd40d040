from flashspec.sampling.rejection import Sample, rejection_sample
from flashspec.sampling.typical import typical_sample

__all__ = ["Sample", "rejection_sample", "typical_sample"]
