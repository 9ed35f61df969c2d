"""Flags of the programs that may run as several processes."""

import sys
from typing import Any

from absl import flags

from jaxsplit.cli.program import text_alone_on_stdout

flags.disclaim_key_flags()  # they belong to the module that has them defined


class Processes:
    """Defines the flags, and starts the processes that they describe."""

    def __init__(self) -> None:
        self._coordinator = flags.DEFINE_string(
            "coordinator",
            None,
            "host:port of process 0, if there are several that Slurm, Open MPI or "
            "Kubernetes has not started",
        )
        self._count = flags.DEFINE_integer("num_processes", None, "how many processes there are")
        self._index = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")

    def start(self) -> bool:
        """Joins the others, before any other use of JAX.

        Returns:
          whether there are several processes.

        Raises:
          JaxsplitError: they do not find one another, or flags are missing.
        """
        from jaxsplit.sharding import detected_launcher, start_processes

        if self._index.value is not None or detected_launcher():
            text_alone_on_stdout()
        return start_processes(self._coordinator.value, self._count.value, self._index.value)

    def agree(self, module: str, own: list[str], value: Any = None) -> Any:
        """Makes process 0's flags hold in all.

        Args:
          module: name of the module with the program's flags.
          own: names of flags that are each process's own: those about its machine.
          value: one more that process 0 has for all.

        Returns:
          process 0's value.
        """
        from jaxsplit.sharding import broadcast_from_process_0

        values = {
            flag.name: flag.value
            for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[module])
            if flag.name not in (*own, self._index.name)
        }
        values, agreed = broadcast_from_process_0((values, value))
        for name, found in values.items():
            flags.FLAGS[name].value = found
        return agreed
