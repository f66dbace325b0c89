"""The names of records in each generation."""

import flwr.common as fc

RecordDict = getattr(fc, "RecordDict", None) or fc.RecordSet
ArrayRecord = getattr(fc, "ArrayRecord", None) or fc.ParametersRecord
MetricRecord = getattr(fc, "MetricRecord", None) or fc.MetricsRecord
ConfigRecord = getattr(fc, "ConfigRecord", None) or fc.ConfigsRecord
Array = getattr(fc, "Array", None)
if Array is None:
    from flwr.common.record import Array


def kinds(content):
    """Give the records by kind, whatever the generation calls them."""
    if hasattr(content, "config_records"):
        return content.array_records, content.metric_records, content.config_records
    return content.parameters_records, content.metrics_records, content.configs_records


def make(arrays=None, metrics=None, configs=None):
    content = RecordDict()
    a, m, c = [], [], []
    if hasattr(content, "config_records"):
        for name, r in [*(arrays or {}).items(), *(metrics or {}).items(), *(configs or {}).items()]:
            content[name] = r
    else:
        a, m, c = kinds(content)
        a.update(arrays or {})
        m.update(metrics or {})
        c.update(configs or {})
    return content


def array_record(arrays):
    """Make a record of named numpy arrays."""
    import io

    import numpy as np

    made = {}
    for name, a in arrays.items():
        f = io.BytesIO()
        np.save(f, a, allow_pickle=False)
        try:
            made[name] = Array(dtype=str(a.dtype), shape=tuple(a.shape), stype="numpy.ndarray", data=f.getvalue())
        except TypeError:  # some generations want a list
            made[name] = Array(dtype=str(a.dtype), shape=list(a.shape), stype="numpy.ndarray", data=f.getvalue())
    record = ArrayRecord()
    for name, a in made.items():
        record[name] = a
    return record
