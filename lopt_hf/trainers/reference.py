"""The reference model of a preference or policy loss."""

from transformers import PreTrainedModel

from lopt_hf.local.embeddings import untie_output_embeddings

__all__ = ["check_synchronised_reference", "match_reference"]


def check_synchronised_reference(sync_ref_model: bool, engine: str | None) -> None:
    """Raises where the model has parameters that its reference lacks.

    Raises:
        ValueError: If the reference is to follow the model under an engine that the heads belong to.
    """
    if sync_ref_model and engine is not None:
        raise ValueError(
            f"sync_ref_model=True does not work under {engine}, where the local heads are among the model's "
            "parameters; set it to False."
        )


def match_reference(model: PreTrainedModel, ref_model: PreTrainedModel) -> None:
    """Unties the reference's LM head if the model's was untied: TRL copies parameter by parameter, in pairs."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        untie_output_embeddings(ref_model)
