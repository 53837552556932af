from triton.backends.compiler import BaseBackend, GPUTarget


class CPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "cpu"

    def parse_options(self, options: dict) -> dict:
        return options

    def add_stages(self, stages: dict, options: object) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def load_dialects(self, context) -> None:
        raise NotImplementedError("the interpreter compiles nothing")

    def get_module_map(self) -> dict:
        return {}
