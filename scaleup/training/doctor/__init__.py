"""What `scaleup doctor` finds out before a run on several processes or hosts.

    code = examine(read_settings, limit_s=30)       in every process of the job

`examination` is the order of the steps, `steps` their time limits and the meeting of the processes,
`network`, `host` and `estimates` are what the steps measure, and `report` is what is printed.
"""

from scaleup.training.doctor.examination import examine

__all__ = ["examine"]
