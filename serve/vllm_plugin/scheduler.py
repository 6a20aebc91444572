"""vLLM's scheduler for texts that are computed whole: many short ones in a step, or one long one."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from qembed.serve.vllm_plugin.layer_cache import step_tokens


class TextScheduler(Scheduler):
    """Named in `--scheduler-cls`.

    vLLM has one limit for a step, which must be at least the longest text. With a limit of 32,768 tokens, hundreds of short
    texts would go into a step of a minute, and each of them would wait for the last. So a step has its usual size, unless the
    text whose turn it is needs more; then it has that size, and other short texts only where they came before.
    """

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        """Schedule the next step."""
        usual = step_tokens(self.vllm_config)
        if usual is not None:
            first = self.waiting.peek_request().num_tokens if self.waiting else 0
            self.max_num_scheduled_tokens = max(usual, first)
        return super().schedule(*arguments, **options)
