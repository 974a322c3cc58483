from .frontend import initialize, load_state_dict, master_params, scale_loss, state_dict

__all__ = ["initialize", "load_state_dict", "master_params", "scale_loss", "state_dict"]
